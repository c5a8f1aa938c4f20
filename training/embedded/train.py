"""Train the embedded model's projector and decoder on cached vision features.

python train.py vision --out V                           # the packaged model's vision tower
python train.py cache --assets A --vision V --out C      # features of the scenes, once
python train.py run --cache C --out R --minutes 80       # train; call again to resume
python train.py package --run R --vision V --folder F    # write the stock LLaVA folder
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from batches import IGNORE, Batch, Batcher, fixed_questions
from decoder import HEADS, Decoder, Sizes
from export import export
from features import SEEDS, TRAINING, compute, join, read
from questions import KINDS, vocabulary
from safetensors.torch import load_file, save_file
from scenes import NAMES
from torch import Tensor, distributed

from vlmprune import embedded

app = typer.Typer(add_completion=False, help=__doc__)
HEAD_WEIGHTS = {"row": 0.05, "column": 0.05, "own": 0.25, "left": 0.2, "above": 0.2}
COUNT_WEIGHT = 4.0
"""How much more a count's answer weighs than another: it is one word, and the hardest."""
LOOKING, COUNTING = slice(0, 4), slice(4, 6)
"""Heads of the layer after the middle that are taught where to look, and what to count."""
EVALUATED = 20
"""Pictures at once in an evaluation."""
SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@app.command()
def vision(out: Annotated[Path, typer.Option(help="folder to write")]) -> None:
    """Write the packaged model's vision tower as a folder of its own; it is never trained."""
    packaged = embedded.path()
    config = json.loads((packaged / "config.json").read_text())["vision_config"]
    shard = load_file(packaged / "model-00001-of-00002.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key.removeprefix("vision_tower."): value for key, value in shard.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["Dinov2Model"]}))


@app.command()
def cache(
    assets: Annotated[Path, typer.Option(help="folder for the emoji package")],
    vision: Annotated[Path, typer.Option(help="folder of the vision tower")],
    out: Annotated[Path, typer.Option(help="where the features go, 200 MB per 1,000 scenes")],
    train: int = 6000,
    large: int = 1800,
    reading: int = 400,
    clutter: int = 1500,
    validation: int = 300,
    processes: int = 2,
) -> None:
    """Compute and keep the vision features of the scenes."""
    compute("validation", validation, out, assets, vision, processes)
    sets = {"train": train, "large": large, "reading": reading, "clutter": clutter}
    for split, amount in sets.items():
        compute(split, amount, out, assets, vision, processes)


def losses(model: Decoder, batch: Batch, user: Tensor, names: Tensor) -> dict[str, Tensor]:
    """Answer loss and dense losses of a batch; `names` are the word numbers of the cover labels."""
    given = (batch.features, user, batch.tokens, batch.positions, batch.mask)
    visual, between, state, pointed = model(*given, point=True)
    words = model.embed_tokens.weight
    chosen = batch.targets != IGNORE
    logits = state[chosen] @ words.T
    kinds = torch.tensor([COUNT_WEIGHT if q.kind == "count" else 1.0 for q in batch.questions])
    heavy = kinds.to(logits.device)[batch.block[chosen]]
    each = F.cross_entropy(logits, batch.targets[chosen], reduction="none")
    found = {"answer": (each * heavy).sum() / heavy.sum()}
    cover = batch.dense["cover"].flatten()
    flat = F.rms_norm(visual.flatten(0, 1), visual.shape[-1:])
    each = F.cross_entropy(model.scale * (flat @ words.T), names[cover], reduction="none")
    weight = torch.where(cover > 0, 1.0, 0.15)
    found["cover"] = (each * weight).sum() / weight.sum()
    found["digit"] = _labelled(model.digit, visual.flatten(0, 1), batch.dense["digit"])
    between = between.flatten(0, 1)
    for name in HEADS:
        found[name] = _labelled(model.heads[name], between, batch.dense[name])
    for name, heads, wanted in (
        ("point", LOOKING, batch.point),
        ("spread", COUNTING, batch.spread),
    ):
        rows = wanted.any(-1)
        aimed, wanted = pointed[:, heads].transpose(1, 2)[rows], wanted[rows][:, None]
        if name == "point":
            each = -aimed.masked_fill(~wanted, float("-inf")).logsumexp(-1)
        else:
            each = -(aimed * wanted).sum(-1) / wanted.sum(-1) - wanted.sum(-1).log()
        found[name] = each.mean() if bool(rows.any()) else aimed.sum() * 0.0
    return found


def _labelled(head: torch.nn.Module, state: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy where there is a label; zero where there is none at all."""
    labels = labels.flatten()
    chosen = labels != IGNORE
    if not bool(chosen.any()):
        return state.sum() * 0.0
    return F.cross_entropy(head(state[chosen]), labels[chosen])


def total(found: dict[str, Tensor], dense: float) -> Tensor:
    """Weighted sum of the losses; `dense` scales all but the answer's."""
    aside = 0.4 * found["cover"] + 0.1 * found["digit"]
    aside = aside + 0.4 * found["point"] + 0.8 * found["spread"]
    for name in HEADS:
        aside = aside + HEAD_WEIGHTS.get(name, 0.1) * found[name]
    return found["answer"] + dense * aside


@torch.no_grad()
def accuracy(model: Decoder, batcher: Batcher, device: torch.device, rank: int, ranks: int) -> dict:
    """Share of questions by kind whose every answer token is right, teacher-forced."""
    asked = fixed_questions(batcher.data, SEEDS["validation"])
    counts = torch.zeros(len(KINDS), 2, dtype=torch.float64)
    for i in range(rank * EVALUATED, len(asked), ranks * EVALUATED):
        indices = list(range(i, min(i + EVALUATED, len(asked))))
        batch = batcher.batch(indices, asked[i : i + EVALUATED]).to(device)
        user = batcher.user.to(device)
        state = model(batch.features, user, batch.tokens, batch.positions, batch.mask)[2]
        chosen = batch.targets != IGNORE
        guess = (state[chosen] @ model.embed_tokens.weight.T).argmax(-1)
        wrong = set(batch.block[chosen][guess != batch.targets[chosen]].tolist())
        for number, question in enumerate(batch.questions):
            counts[KINDS.index(question.kind)] += torch.tensor([number not in wrong, 1])
    if ranks > 1:
        distributed.all_reduce(counts)
    return {k: round(float(a / b), 4) for k, (a, b) in zip(KINDS, counts, strict=True) if b}


def save(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Checkpoint: weights and optimizer moments as safetensors, everything else as JSON."""
    moments = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            moments[f"{number}.{key}"] = torch.as_tensor(value).contiguous()
    for name, tensors in {"model": model.state_dict(), "optimizer": moments}.items():
        save_file(tensors, folder / f"{name}.new")
    (folder / "state.new").write_text(json.dumps(state))
    for name, kind in {"model": "safetensors", "optimizer": "safetensors", "state": "json"}.items():
        (folder / f"{name}.new").replace(folder / f"{name}.{kind}")


def restore(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> dict:
    """Read a checkpoint back into model and optimizer; returns its state."""
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    whole = optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = value
    whole["state"] = moments
    optimizer.load_state_dict(whole)
    return json.loads((folder / "state.json").read_text())


def mixture_of(scores: dict[str, float]) -> dict[str, float]:
    """Shares of the question kinds: more for what is still wrong."""
    return {k: 0.04 + 1.0 - scores.get(k, 0.0) for k in KINDS if k != "describe"}


@dataclass(frozen=True)
class Settings:
    """What a run is called with; see the options of `run`."""

    cache: Path
    out: Path
    minutes: float
    batch: int
    rows: int
    rate: float
    warm_up: int
    layers: int
    width: int
    dense: float
    every: int
    device: str
    seed: int
    processes: int


@app.command()
def run(
    cache: Annotated[Path, typer.Option(help="folder of cached features")],
    out: Annotated[Path, typer.Option(help="checkpoint and log; resumes what is there")],
    minutes: Annotated[float, typer.Option(help="training time, resumed time included")] = 80,
    batch: Annotated[int, typer.Option(help="pictures a step, over all processes")] = 12,
    rows: Annotated[int, typer.Option(help="rows of 64 question tokens per picture")] = 4,
    rate: float = 1.5e-3,
    warm_up: int = 200,
    layers: int = 5,
    width: int = 192,
    dense: Annotated[float, typer.Option(help="weight of the dense losses")] = 1.0,
    every: Annotated[int, typer.Option(help="steps between evaluations")] = 200,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
    processes: Annotated[int, typer.Option(help="of one thread each; 2 suit two CPU cores")] = 1,
) -> None:
    """Train until the minutes are over; a killed run goes on from its last checkpoint."""
    settings = Settings(**locals())
    out.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        worker(0, settings, "")
        return
    with tempfile.TemporaryDirectory() as meeting:
        args = (settings, f"file://{meeting}/meeting")
        torch.multiprocessing.spawn(worker, args=args, nprocs=processes)


def worker(rank: int, settings: Settings, meeting: str) -> None:
    """Train as one of several equal processes, which average their gradients every step."""
    s, ranks = settings, settings.processes
    if ranks > 1:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    torch.manual_seed(s.seed)
    vocab = vocabulary()
    words = {w: i for i, w in enumerate(vocab)}
    sets = [read(split, s.cache) for split in TRAINING]
    data = join(sets)
    chance = np.concatenate(
        [np.full(len(d), share / len(d)) for d, share in zip(sets, TRAINING.values(), strict=True)]
    )
    batcher = Batcher(data, words, s.rows)
    validation = Batcher(read("validation", s.cache), words, s.rows)
    sizes = Sizes(len(vocab), hidden_size=s.width, num_hidden_layers=s.layers)
    place = torch.device(s.device)
    model = Decoder(sizes)
    sample = data.take(range(0, len(data), max(1, len(data) // 64)))
    model.multi_modal_projector.mean.copy_(sample.mean((0, 1)))
    model.multi_modal_projector.std.copy_(sample.std((0, 1)) + 1e-3)
    model.to(place)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.rate, betas=(0.9, 0.98))
    state = {"step": 0, "seconds": 0.0, "scores": {}}
    if (s.out / "state.json").exists():
        state = restore(s.out, model, optimizer)
    user = batcher.user.to(place)
    names = torch.tensor([words["nothing"], *(words[n] for n in NAMES)], device=place)
    began, before = time.monotonic(), state["seconds"]
    running: dict[str, float] = {}
    while state["seconds"] < s.minutes * 60:
        scores, step = state["scores"], state["step"]
        rng = np.random.default_rng([s.seed, rank, step])
        describe = 0.2 if scores.get("describe", 0.0) < 0.8 else 0.05
        indices = rng.choice(len(data), size=s.batch // ranks, p=chance).tolist()
        asked = [batcher.draw(i, rng, mixture_of(scores), describe) for i in indices]
        found = losses(model, batcher.batch(indices, asked).to(place), user, names)
        progress = min(1.0, state["seconds"] / (s.minutes * 60))
        falling = 0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = s.rate * min(1.0, (step + 1) / s.warm_up) * falling
        optimizer.zero_grad(set_to_none=True)
        total(found, s.dense).backward()
        seconds = average(model, ranks, before + time.monotonic() - began)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, tensor in found.items():
            value = float(tensor.detach())
            running[key] = 0.98 * running.get(key, value) + 0.02 * value
        state |= {"step": step + 1, "seconds": seconds}
        if state["step"] % s.every and seconds < s.minutes * 60:
            continue
        state["scores"] = accuracy(model, validation, place, rank, ranks)
        state["settings"] = {"sizes": vars(sizes), "batch": s.batch, "rows": s.rows, "rate": s.rate}
        if rank == 0:
            line = {k: state[k] for k in ("step", "seconds", "scores")}
            line["loss"] = {k: round(v, 4) for k, v in running.items()}
            with (s.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            typer.echo(json.dumps(line))
            save(s.out, model, optimizer, state)


def average(model: Decoder, ranks: int, seconds: float) -> float:
    """Average the gradients over the processes, in place; returns their mean time as well."""
    if ranks == 1:
        return seconds
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([torch.tensor([seconds]), *(g.flatten() for g in gradients)]) / ranks
    distributed.all_reduce(flat)
    parts = flat[1:].split([g.numel() for g in gradients])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return float(flat[0])


@app.command()
def package(
    run: Annotated[Path, typer.Option(help="folder of the checkpoint")],
    vision: Annotated[Path, typer.Option(help="folder of the vision tower")],
    folder: Annotated[Path, typer.Option(help="the stock LLaVA folder to write")],
) -> None:
    """Write the checkpoint and the vision tower as a stock LLaVA folder."""
    state = json.loads((run / "state.json").read_text())
    sizes = Sizes(**state["settings"]["sizes"])
    model = Decoder(sizes)
    model.load_state_dict(load_file(run / "model.safetensors"))
    text_config = {k: getattr(sizes, k) for k in SIZE_FIELDS}
    export(folder, vision, model.exported(), text_config, vocabulary())
    typer.echo(f"step {state['step']}: wrote {folder}")


if __name__ == "__main__":
    app()
