"""Others' ways beside ours, on the same model and the same prompt, in one run.

    python benchmarks/peers.py --threads 1
    python benchmarks/peers.py --peer authors --shape llava-1.5-7b --layers 4 --device cuda
    pip install kvpress && python benchmarks/peers.py --peer kvpress --json out.json

- authors: VisPruner as released, written afresh from its description, at batch 1: eager attention
  that returns the weights of all layers of the tower, one batch of crops, the choice, the
  projector on what is kept, and the language model on embeddings. Against VisPruner attached to
  the same model, and against no pruning.
- kvpress: AdaKV of the package kvpress, which masks keys and frees none, against PLPHP with
  per_head="adaptive" at as many pairs of key and value: bytes held and the decode step.

Each is optional: one that cannot run here is skipped by its name, with the reason. All ways take
turns within one process, the order reversed every other time, after a warm-up. Weights are random.
Ratios are medians over turns of the ratio within one turn; the spread beside them is half the
distance between the quartiles, relative to the median. Only ratios are printed, as absolute times
of a CPU say little (the JSON file holds them); with --threads 1 they are of processor time, which
bears other work on the machine better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from page_parts import around, table
from peer_ways import RATIO, Job, SkippedError, authors, kvpress, version_of
from program import about, command, content, place, refuse, save
from vlmprune.io.models import quiet
from vlmprune.study.bench import shapes

PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {"authors": authors, "kvpress": kvpress}


def run(job: Job, names: list[str]) -> dict[str, dict[str, Any]]:
    """Every peer's figures by its name, or {"skipped": why}."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            with quiet():
                found[name] = PEERS[name](job)
        except SkippedError as reason:
            found[name] = {"skipped": str(reason)}
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Every peer's figures, or why there are none."""
    setting = found["setting"]
    parts = [
        f"{setting['shape']}, {setting['images']} picture(s), {setting['visual_tokens']} visual "
        f"and {setting['text_tokens']} text tokens, keep {setting['keep']}, retention "
        f"{setting['retention']}, {setting['new_tokens']} new tokens, {setting['repeat']} turns; "
        f"{about(setting, setting['dtype'])}."
    ]
    for name, result in found["peers"].items():
        if "skipped" in result:
            parts.append(f"{name}: skipped. {result['skipped']}")
            continue
        timed = [key for key in ("first_token", "whole_call", "decode_step") if key in result]
        rows = [
            [key.replace("_", " "), *(around(made) for made in result[key].values())]
            for key in timed
        ]
        parts += [f"**{name}**", table(["time", *result[timed[0]]], rows)]
        for key in ("pairs_attended", "bytes_held_after_prefill"):
            if key in result:
                shares = ", ".join(f"{way} {share:.1%}" for way, share in result[key].items())
                parts.append(f"{key.replace('_', ' ')}: {shares}")
        if "kept" in result:
            parts.append(choices(result))
    return "\n\n".join(parts)


def choices(result: Mapping[str, Any]) -> str:
    """Whether the authors' procedure and ours choose and answer the same."""
    clear, said = (
        "the same" if result[key] else "DIFFERENT"
        for key in ("same_choice_on_clear_inputs", "same_answer_given_the_same_tokens")
    )
    return (
        f"choice: {clear} tokens on inputs where rounding decides nothing; on this tower's "
        f"features {result['kept_by_both']} of {result['kept']} tokens are kept by both; theirs in "
        f"float64 keeps {result['kept_by_theirs_in_float64_too']} of its own; given the same "
        f"tokens, {said} answer"
    )


@torch.inference_mode()
def main(
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PEERS)}.")] = None,
    shape: Annotated[str, typer.Option(help="A LLaVA-1.5 shape: small, llava-1.5-7b.")] = "small",
    layers: Annotated[int | None, typer.Option(help="Decoder layers; default: all.")] = None,
    tower_layers: Annotated[int | None, typer.Option(help="Vision layers; default: all.")] = None,
    images: Annotated[int, typer.Option(help="Pictures in the prompt.", min=1)] = 1,
    text: Annotated[int, typer.Option(help="Words in the prompt.", min=1)] = 64,
    keep: Annotated[int, typer.Option(help="VisPruner: tokens kept of each picture.")] = 64,
    retention: Annotated[float, typer.Option(help="PLPHP: share kept of visual tokens.")] = 0.4,
    new_tokens: Annotated[int, typer.Option(help="Tokens each call generates.", min=1)] = 4,
    repeat: Annotated[int, typer.Option(help="Turns.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Compare others' ways with ours on the same work."""
    names = peer or list(PEERS)
    unknown = [name for name in names if name not in PEERS]
    refuse({f"--peer {one} is unknown; use {', '.join(PEERS)}.": True for one in unknown})
    where, kind = place(device, dtype, threads)
    config = shapes.config_of(shape, layers, tower_layers)
    tokens, important = shapes.tokens_per_image(config), int(keep * RATIO)
    fits = 8 <= keep - important <= tokens - important and (tokens - important) % 2 == 0
    refuse(
        {
            f"--shape {shape} is no LLaVA-1.5; use small or llava-1.5-7b.": config.model_type
            != "llava",
            f"the authors' procedure fails at --keep {keep}: half of it must be 8 or more, "
            f"{tokens} at most in all, and leave an even number of {tokens}; use 64.": not fits,
        }
    )
    model = shapes.build(config, where, kind)
    inputs = shapes.prompt(model, 1, images, text)
    setting = {
        "shape": shape,
        "layers": shapes.depths(config),
        "dtype": str(kind).removeprefix("torch."),
        "images": images,
        "visual_tokens": images * tokens,
        "text_tokens": text,
        "keep": keep,
        "retention": retention,
        "new_tokens": new_tokens,
        "repeat": repeat,
    }
    made = run(Job(model, inputs, keep, retention, new_tokens, repeat), names)
    found = content(where, setting, peers=made)
    if "skipped" not in made.get("kvpress", {"skipped": ""}):
        found["setting"]["versions"]["kvpress"] = version_of("kvpress")
    print(markdown(found))
    save(json_path, found)


if __name__ == "__main__":
    command(main)()
