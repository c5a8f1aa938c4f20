"""Accuracy of the packaged model by question kind, through the stock model, greedy.

    python evaluate.py --assets A --out result.json

The scenes lie on photographs, at places and with contents that training never saw. Five
conditions: all 256 visual tokens, all those of a blank grey picture instead, none, 64 at random,
and an even 8 x 8 grid of them; what is kept keeps its original positions. The pictures go through
the processor and the model's own `get_image_features`; the answers come from the stock forward with
its cache. The first scenes are also answered by the literal `processor(...)` and `generate`, and
must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import typer
from assets import Assets
from batches import fixed_questions
from features import SEEDS, TOKENS, photos
from PIL import Image
from questions import Question, prompt, right
from rich.progress import track
from scenes import GRID, PATCHES, SIDE, scene
from torch import Tensor

from vlmprune.files import write
from vlmprune.hosts.release import cache_returned, with_cache

TOGETHER = 5
"""Scenes answered at once."""
LONGEST = 40
"""Tokens of the longest answer, a description of 16 cells, and some to spare."""


def conditions(seed: int) -> dict[str, Callable[[int], Tensor]]:
    """Names of the conditions; each gives the kept visual tokens of scene number `i`, ascending."""
    grid = torch.arange(TOKENS).view(PATCHES, PATCHES)[::2, ::2].flatten()

    def random(number: int) -> Tensor:
        drawn = np.random.default_rng([seed, number]).permutation(TOKENS)[:64]
        return torch.from_numpy(np.sort(drawn))

    return {
        "all": lambda number: torch.arange(TOKENS),
        "blank": lambda number: torch.arange(TOKENS),
        "none": lambda number: torch.arange(0),
        "random 64": random,
        "grid 64": lambda number: grid,
    }


@torch.inference_mode()
def visual_tokens(model, processor, picture: Image.Image) -> Tensor:
    """The picture's visual tokens as the decoder gets them, `[256, hidden]`."""
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    features = model.model.get_image_features(pixels.to(model.device, model.dtype))
    features = getattr(features, "pooler_output", features)
    return features[0] if isinstance(features, list | tuple) else features.squeeze(0)


@torch.inference_mode()
def answers(model, processor, asked: list[tuple[Question, Tensor, Tensor]]) -> list[str]:
    """Greedy answers to questions, each with its picture's visual tokens and the kept of these."""
    tokenizer, device = processor.tokenizer, model.device
    image, pad = model.config.image_token_id, tokenizer.pad_token_id
    rows = []
    for question, _, kept in asked:
        ids = torch.tensor(tokenizer(prompt(question.text))["input_ids"])
        at = int((ids == image).nonzero())
        ids = torch.cat([ids[:at], torch.full((TOKENS,), image), ids[at + 1 :]])
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[at : at + TOKENS] = False
        stays[at + kept] = True
        rows.append((ids[stays], stays.nonzero().flatten()))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, (found, where) in enumerate(rows):
        ids[row, -len(found) :], positions[row, -len(found) :] = found, where
        mask[row, -len(found) :] = 1
    ids, positions, mask = ids.to(device), positions.to(device), mask.to(device)
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == image] = torch.cat([visual[kept] for _, visual, kept in asked]).to(embeds)
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True)
    last, written = positions[:, -1:], []
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for _ in range(LONGEST):
        chosen = out.logits[:, -1].argmax(-1)
        written.append(torch.where(finished, pad, chosen))
        finished = finished | (chosen == tokenizer.eos_token_id)
        if bool(finished.all()):
            break
        last, mask = last + 1, torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=last,
            use_cache=True,
            **with_cache(type(model), {}, cache_returned(out)),
        )
    texts = tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def literal(model, processor, picture: Image.Image, question: Question) -> str:
    """The answer by the plainest use: `processor(...)`, then `generate`."""
    inputs = processor(text=prompt(question.text), images=picture, return_tensors="pt")
    out = model.generate(**inputs.to(model.device), max_new_tokens=LONGEST, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


def cells_right(question: Question, answer: str) -> float:
    """Share of the 16 cells that a description names rightly."""
    true, said = (t.replace(".", ",").rstrip(", ").split(",") for t in (question.answer, answer))
    hits = sum(a.strip() == b.strip() for a, b in zip(true, said, strict=False))
    return hits / (GRID * GRID)


def measure(model, processor, assets: Assets, amount: int, check: int) -> dict:
    """Accuracy by condition and kind over `amount` test scenes, as a JSON-ready mapping."""
    made = [scene(i, SEEDS["test"], photos("test"), assets) for i in range(amount)]
    asked = fixed_questions(SimpleNamespace(placed=[s.placed for s in made]), SEEDS["test"])
    chosen = conditions(SEEDS["test"])
    grey = visual_tokens(model, processor, Image.new("RGB", (SIDE, SIDE), (128, 128, 128)))
    hits: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    agreed: list[bool] = []
    for first in track(range(0, amount, TOGETHER)):
        some = range(first, min(first + TOGETHER, amount))
        visual = {i: visual_tokens(model, processor, made[i].image) for i in some}
        pairs = [(i, question) for i in some for question in asked[i]]
        for name, kept in chosen.items():
            seen = dict.fromkeys(some, grey) if name == "blank" else visual
            said = answers(model, processor, [(q, seen[i], kept(i)) for i, q in pairs])
            for (number, question), answer in zip(pairs, said, strict=True):
                kinds = hits[name]
                kinds.setdefault(question.kind, []).append(float(right(question, answer)))
                if question.kind == "describe":
                    share = cells_right(question, answer)
                    kinds.setdefault("describe, per cell", []).append(share)
                if name == "all" and number < check:
                    agreed.append(answer == literal(model, processor, made[number].image, question))
    table = {n: {k: round(float(np.mean(v)), 4) for k, v in h.items()} for n, h in hits.items()}
    counts = {k: len(v) for k, v in hits["all"].items() if k != "describe, per cell"}
    return {
        "scenes": amount,
        "questions": sum(counts.values()),
        "questions by kind": counts,
        "accuracy": table,
        "answers also by generate": len(agreed),
        "of these equal": sum(agreed),
    }


def main(
    assets: Annotated[Path, typer.Option(help="folder of the emoji package, fetched if absent")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    scenes: Annotated[int, typer.Option(help="test scenes, eight questions each")] = 300,
    check: Annotated[int, typer.Option(help="scenes answered by plain generate as well")] = 8,
    model: Annotated[
        Path | None, typer.Option(help="model folder; the packaged one if absent")
    ] = None,
    device: str = "cpu",
) -> None:
    """Measure and write the accuracies."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    if model is None:
        from vlmprune import embedded

        model = embedded.path()
    net = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(model)
    found = measure(net.eval().to(device), processor, Assets(assets), scenes, check)
    write(out, json.dumps(found, indent=2) + "\n")
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
