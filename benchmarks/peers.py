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
- openvino: visual token pruning of OpenVINO GenAI.

Each is optional: one that cannot run here is skipped by its name, with the reason. All ways take
turns within one process, the order reversed every other time, after a warm-up. Weights are random.
Ratios are medians over turns of the ratio within one turn; the spread beside them is half the
distance between the quartiles, relative to the median. Only ratios are printed, as absolute times
of a CPU say little (the JSON file holds them); with --threads 1 they are of processor time, which
bears other work on the machine better.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from peer_ways import RATIO, Job, SkippedError, authors, kvpress, openvino, version_of
from vlmprune import VlmpruneError
from vlmprune.files import write
from vlmprune.io.models import quiet
from vlmprune.study.bench import shapes
from vlmprune.study.measure import facts

PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "authors": authors,
    "kvpress": kvpress,
    "openvino": openvino,
}


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


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one peer's figures, or why there are none."""
    if "skipped" in result:
        console.print(f"{name}: skipped. {result['skipped']}", markup=False, soft_wrap=True)
        return
    table = Table(title=name, title_justify="left")
    table.add_column("time")
    timed = [key for key in ("first_token", "whole_call", "decode_step") if key in result]
    for pair in result[timed[0]]:
        table.add_column(pair, justify="right")
    for key in timed:
        cells = [f"{middle:.2f} ± {spread:.0%}" for middle, spread in result[key].values()]
        table.add_row(key.replace("_", " "), *cells)
    console.print(table)
    if "kept" in result:
        clear, said = (
            "the same" if result[key] else "DIFFERENT"
            for key in ("same_choice_on_clear_inputs", "same_answer_given_the_same_tokens")
        )
        console.print(f"choice: {clear} tokens on inputs where rounding decides nothing")
        console.print(
            f"on this tower's features {result['kept_by_both']} of {result['kept']} tokens are "
            f"kept by both; theirs in float64 keeps {result['kept_by_theirs_in_float64_too']} of "
            f"its own; given the same tokens, {said} answer",
            soft_wrap=True,
        )
    for key in ("pairs_attended", "bytes_held_after_prefill"):
        if key in result:
            shares = ", ".join(f"{way} {share:.1%}" for way, share in result[key].items())
            console.print(f"{key.replace('_', ' ')}: {shares}")


@torch.inference_mode()
def main(
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PEERS)}.")] = None,
    shape: Annotated[str, typer.Option(help="A LLaVA-1.5 shape: small, llava-1.5-7b.")] = "small",
    layers: Annotated[int | None, typer.Option(help="Decoder layers; default: all.")] = None,
    tower_layers: Annotated[int | None, typer.Option(help="Vision layers; default: all.")] = None,
    images: Annotated[int, typer.Option(help="Pictures in the prompt.")] = 1,
    text: Annotated[int, typer.Option(help="Words in the prompt.")] = 64,
    keep: Annotated[int, typer.Option(help="VisPruner: tokens kept of each picture.")] = 64,
    retention: Annotated[float, typer.Option(help="PLPHP: share kept of visual tokens.")] = 0.4,
    new_tokens: Annotated[int, typer.Option(help="Tokens each call generates.")] = 4,
    repeat: Annotated[int, typer.Option(help="Turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Compare others' ways with ours on the same work."""
    names = peer or list(PEERS)
    for name in names:
        if name not in PEERS:
            raise typer.BadParameter(f"--peer {name} is unknown; use {', '.join(PEERS)}.")
    if min(images, text, new_tokens) < 1 or repeat < 2:
        raise typer.BadParameter("--images, --text, --new-tokens: 1 or more; --repeat: 2 or more.")
    if threads is not None:
        torch.set_num_threads(threads)
    kind = dtype or ("bfloat16" if device != "cpu" else "float32")
    try:
        config = shapes.config_of(shape, layers, tower_layers)
        if config.model_type != "llava":
            raise VlmpruneError(f"--shape {shape} is no LLaVA-1.5; use small or llava-1.5-7b.")
        tokens, important = shapes.tokens_per_image(config), int(keep * RATIO)
        if not 8 <= keep - important <= tokens - important or (tokens - important) % 2:
            raise VlmpruneError(
                f"the authors' procedure fails at --keep {keep}: half of it must be 8 or more, "
                f"{tokens} at most in all, and leave an even number of {tokens}; use 64."
            )
        model = shapes.build(config, torch.device(device), getattr(torch, kind))
        inputs = shapes.prompt(model, 1, images, text)
        found = run(Job(model, inputs, keep, retention, new_tokens, repeat), names)
    except VlmpruneError as error:
        raise typer.BadParameter(str(error)) from error
    setting = facts(model.device) | {
        "shape": shape,
        "layers": shapes.depths(config),
        "dtype": kind,
        "images": images,
        "visual_tokens": images * tokens,
        "text_tokens": text,
        "keep": keep,
        "retention": retention,
        "new_tokens": new_tokens,
        "repeat": repeat,
    }
    packages = {"kvpress": "kvpress", "openvino": "openvino-genai"}
    for name in names:
        if "skipped" not in found[name] and name in packages:
            setting["versions"][packages[name]] = version_of(packages[name])
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in setting["versions"].items()))
    console.print(
        f"{shape}, {kind}, {setting['threads']} thread(s), {images} x {tokens} visual and {text} "
        f"text tokens, keep {keep}, retention {retention}, {new_tokens} new tokens, {repeat} turns"
    )
    for name in names:
        show(console, name, found[name])
    if json_path is not None:
        note = "use the ratios only" if model.device.type == "cpu" else "measured on a GPU"
        content = {"setting": setting, "seconds_are": note, "peers": found}
        write(json_path, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
