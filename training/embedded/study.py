"""A small measured study: at equal compute, more layers or more visual tokens?

python study.py run --cache C --out S       # train and measure each depth; resumes by depth
python study.py page --out S --json ../../benchmarks/results/equal_compute.json

The family are decoders of 2, 3 and 5 layers, cut out of the embedded model's (evenly spaced, the
last one always kept) and trained on with visual tokens averaged to grids of 1 x 1 to 16 x 16, every
grid in turn. Each depth sees the same scenes, questions and steps. The cache is that of
`train.py cache`, with a `test` set beside the training sets.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from batches import IGNORE, Batch, Batcher, fixed_questions
from decoder import PREFIX, Decoder, Sizes, rotary
from features import SEEDS, TRAINING, join, read
from questions import KINDS, vocabulary
from safetensors.torch import load_file, save_file
from scenes import PATCHES
from torch import Tensor

from vlmprune import costs, embedded
from vlmprune.files import write

app = typer.Typer(add_completion=False, help=__doc__)
DEPTHS = (5, 3, 2)
SIDES = (16, 12, 10, 8, 6, 4, 3, 2, 1)
TEXT = 12
"""Tokens of a prompt beside the visual ones, as questions and their frame have on average."""


class Pooled(Decoder):
    """The decoder on pictures whose visual tokens are averaged to a coarser grid."""

    def pooled(self, batch: Batch, user: Tensor, side: int) -> Tensor:
        """Normalised last state of the questions, `[B * rows, R, H]`, with side x side tokens."""
        grid = batch.features.transpose(1, 2).unflatten(-1, (PATCHES, PATCHES))
        visual = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
        visual = self.multi_modal_projector(visual)
        start = self.embed_tokens(user).expand(len(visual), 1, -1)
        image, text = torch.cat([start, visual], dim=1), self.embed_tokens(batch.tokens)
        # A token stands at the place of the patch at its middle; questions stand where they did.
        middle = ((torch.arange(side) + 0.5) * PATCHES / side).floor().long()
        places = 1 + (middle[:, None] * PATCHES + middle).flatten()
        dim = self.sizes.head_dim
        image_table = rotary(torch.cat([torch.zeros(1).long(), places]), dim)
        cos, sin = rotary(batch.positions, dim)
        mask = torch.cat([batch.mask[..., : 1 + side * side], batch.mask[..., PREFIX:]], dim=-1)
        for layer in self.layers:
            image, text, _ = layer(image, text, image_table, (cos[:, None], sin[:, None]), mask)
        return self.norm(text)


def cut(depth: int) -> Pooled:
    """A decoder of so many of the embedded model's layers, with its weights."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(embedded.path().glob("*.safetensors")):
        weights |= load_file(shard)
    config = json.loads((embedded.path() / "config.json").read_text())["text_config"]
    whole = config["num_hidden_layers"]
    taken = [round(i * (whole - 1) / (depth - 1)) for i in range(depth)]
    model = Pooled(Sizes(config["vocab_size"], num_hidden_layers=depth))
    own = model.state_dict()
    for key in own:
        name = key
        if key.startswith("layers."):
            _, number, rest = key.split(".", 2)
            name = f"layers.{taken[int(number)]}.{rest}"
        for prefix in ("", "model.", "language_model.", "language_model.model."):
            if prefix + name in weights:
                own[key] = weights[prefix + name].float()
    model.load_state_dict(own)
    return model


def answer_loss(model: Pooled, batch: Batch, user: Tensor, side: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    state = model.pooled(batch, user, side)
    chosen = batch.targets != IGNORE
    return F.cross_entropy(state[chosen] @ model.embed_tokens.weight.T, batch.targets[chosen])


@torch.no_grad()
def right(model: Pooled, batcher: Batcher, side: int) -> list[dict[str, list[bool]]]:
    """Of each scene, by kind, whether its questions are answered right word for word.

    Teacher-forced, which for "right only if every word is" equals greedy decoding.
    """
    asked = fixed_questions(batcher.data, SEEDS["test"])
    found: list[dict[str, list[bool]]] = []
    for i in range(0, len(asked), 20):
        part = asked[i : i + 20]
        batch = batcher.batch(list(range(i, i + len(part))), part)
        guess = (model.pooled(batch, batcher.user, side) @ model.embed_tokens.weight.T).argmax(-1)
        chosen = batch.targets != IGNORE
        wrong = set(batch.block[chosen & (guess != batch.targets)].tolist())
        number = 0
        for questions in part:
            scene: dict[str, list[bool]] = {}
            for question in questions:
                scene.setdefault(question.kind, []).append(number not in wrong)
                number += 1
            found.append(scene)
    return found


def summary(scenes: list[dict[str, list[bool]]], kinds: tuple[str, ...]) -> dict[str, float]:
    """Share right over the questions of these kinds, with a 95 % bootstrap over scenes."""
    pairs = [[x for k in kinds for x in scene.get(k, [])] for scene in scenes]
    sums = np.array([[sum(one), len(one)] for one in pairs], dtype=float)
    rng = np.random.default_rng(0)
    draws = sums[rng.integers(0, len(sums), (1000, len(sums)))].sum(1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    right, asked = sums.sum(0)
    return {"right": right / asked, "low": low, "high": high, "asked": int(asked)}


@app.command()
def run(
    cache: Annotated[Path, typer.Option(help="folder of cached features")],
    out: Annotated[Path, typer.Option(help="one result and its weights a depth")],
    steps: int = 270,
    batch: int = 12,
    rows: int = 2,
    rate: float = 6e-4,
    seed: int = 0,
    bfloat16: Annotated[bool, typer.Option(help="train in mixed precision")] = True,
) -> None:
    """Train and measure every depth that has no result yet."""
    out.mkdir(parents=True, exist_ok=True)
    words = {w: i for i, w in enumerate(vocabulary())}
    sets = [read(split, cache) for split in TRAINING]
    data = join(sets)
    shares = zip(sets, TRAINING.values(), strict=True)
    chance = np.concatenate([np.full(len(d), share / len(d)) for d, share in shares])
    batcher, test = Batcher(data, words, rows), Batcher(read("test", cache), words, rows)
    mixture = {kind: 1.0 for kind in KINDS if kind != "describe"}
    for depth in DEPTHS:
        if (out / f"{depth}.json").exists():
            continue
        began = time.monotonic()
        torch.manual_seed(seed)
        model = cut(depth)
        parameters = [p for n, p in model.named_parameters() if not n.startswith("heads.")]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        loss = 0.0
        for step in range(steps):
            rng = np.random.default_rng([seed, step])
            indices = rng.choice(len(data), size=batch, p=chance).tolist()
            asked = [batcher.draw(i, rng, mixture, 0.1) for i in indices]
            falling = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50) * falling
            optimizer.zero_grad(set_to_none=True)
            side = SIDES[step % len(SIDES)]
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                found = answer_loss(model, batcher.batch(indices, asked), batcher.user, side)
            found.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss = 0.98 * (loss or float(found.detach())) + 0.02 * float(found.detach())
            if step % 50 == 49:
                passed = time.monotonic() - began
                typer.echo(f"{depth} layers, step {step + 1}, loss {loss:.3f}, {passed:.0f} s")
        results = {side * side: right(model, test, side) for side in SIDES}
        save_file(model.state_dict(), out / f"{depth}.safetensors")
        made = {"steps": steps, "batch": batch, "rate": rate, "seed": seed, "loss": loss}
        made |= {"scenes": len(test.data), "training_scenes": len(data)}
        write(out / f"{depth}.json", json.dumps({"made": made, "tokens": results}))


@app.command()
def page(
    out: Annotated[Path, typer.Option(help="where `run` left its results")],
    json_file: Annotated[Path, typer.Option("--json", help="the figures to write")],
) -> None:
    """Sum the results up, with the FLOPs of each pair."""
    kinds = {"all": KINDS, "reading": ("read",), "the rest": tuple(set(KINDS) - {"read"})}
    rows, made = [], {}
    for depth in sorted(DEPTHS):
        result = json.loads((out / f"{depth}.json").read_text())
        made = result["made"] | {"loss": made.get("loss", {}) | {depth: result["made"]["loss"]}}
        sizes = Sizes(len(vocabulary()), num_hidden_layers=depth)
        for tokens, scenes in result["tokens"].items():
            flops = costs.prefill_flops(sizes, int(tokens) + TEXT)
            scores = {name: summary(scenes, some) for name, some in kinds.items()}
            rows.append({"layers": depth, "tokens": int(tokens), "mflops": flops / 1e6} | scores)
    write(json_file, json.dumps({"made": made, "text": TEXT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app()
