"""What a shorter vision encoder gives a whole call on the embedded model, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/tower.py --json benchmarks/results/tower.json
    OMP_NUM_THREADS=1 python benchmarks/tower.py --quick

On this model nine tenths of a call's work is the encoder's. VisPruner alone leaves that as it is;
chained behind a method that acts inside the encoder it chooses among what that leaves. On the same
pictures all ways take turns within one process: `generate` from pixels to a short answer, in
seconds of processor time on one thread, as ratios picture by picture. The accuracy is that on all
held-out questions. The settings were chosen before anything was measured. `render.py` writes the
table of docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from accuracy_tables import percent
from page_parts import RESULTS, around, table
from program import about, command, content, save
from turns import in_turns, ratio, seconds
from vlmprune import EViT, ToMe, VisPruner, embedded
from vlmprune.io.models import Loaded, attached, prepare_texts, quiet
from vlmprune.pruner import Pruner
from vlmprune.study.evals.results import UNPRUNED, Evaluation
from vlmprune.study.evals.run import BATCH, evaluate
from vlmprune.study.tasks import Sample, Scenes
from vlmprune.study.tasks.answered import Answered

FILE = RESULTS / "tower.json"
CPU = torch.device("cpu")
FRACTIONS = (0.5, 0.25)
"""Of a picture's 256 patches, what is left at the encoder's end."""
AFTER = (64, 32)
"""Visual tokens that VisPruner keeps of those."""
TOKENS = 4
"""Of each answer, the first of them included."""


def ways() -> dict[str, Pruner | None]:
    """What is compared, by name."""
    found: dict[str, Pruner | None] = {UNPRUNED: None}
    for keep in AFTER:
        found[f"VisPruner({keep})"] = VisPruner(keep)
        for first in (ToMe, EViT):
            for left in FRACTIONS:
                name = f"{first.__name__}({left}) \\| VisPruner({keep})"
                found[name] = first(left) | VisPruner(keep)
    return found


def pictures(count: int) -> list[Sample]:
    """A question about each of the first scenes: of one the first, of the next the second, …"""
    scenes: dict[str, list[Sample]] = {}
    for one in Scenes().samples():
        scenes.setdefault(one.group, []).append(one)
    return [own[n % len(own)] for n, own in enumerate(list(scenes.values())[:count])]


@torch.inference_mode()
def timed(loaded: Loaded, asked: list[Sample]) -> dict[str, list[float]]:
    """Seconds of a whole call by way, picture by picture."""
    pruners, task = ways(), Scenes()
    found: dict[str, list[float]] = {name: [] for name in pruners}
    for number, sample in enumerate([asked[0], *asked]):
        text = task.prompt(sample, loaded.processor)
        inputs = prepare_texts(loaded, [sample.opened()], [text])

        # The model's `generate` is another while a pruner is attached.
        def call(inputs: Any = inputs) -> Any:
            length = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
            return loaded.model.generate(**inputs, **length, do_sample=False)

        def turn(name: str, call: Callable[[], Any] = call) -> float:
            with attached(pruners[name], loaded.model):
                return seconds(call, CPU)

        # Both orders, so that nobody always comes behind the same one; the first is a warm-up.
        for name, both in in_turns(pruners, turn, 2).items():
            if number:
                found[name].append(sum(both) / 2)
    return found


def figures(one: Evaluation) -> dict[str, Any]:
    """What is stored of an evaluation: a digit a question, in the task's order, and the FLOPs."""
    return {
        "scores": "".join(str(int(result.score or 0)) for result in one.results),
        "flops": round(one.share("flops"), 4),
        "tokens": round(one.total("visual_tokens") / len(one.results), 1),
    }


def evaluation(found: Mapping[str, Any], name: str) -> Evaluation:
    """A way's evaluation as it was stored."""
    scores = found["ways"][name]["scores"]
    results = tuple(
        Answered(one, group, kind, "", int(score), *[0.0] * 9)
        for (one, kind, group), score in zip(found["samples"], scores, strict=True)
    )
    return Evaluation("scenes", name, "", results)


def markdown(found: Mapping[str, Any]) -> str:
    """The table, with what it is about."""
    plain = found["ways"][UNPRUNED]
    heads = ["way", "time", "beside VisPruner alone", "FLOPs", "tokens", "accuracy", "minus it"]
    beside, rows = UNPRUNED, []
    for name, own in found["ways"].items():
        alone = name.startswith("VisPruner")
        beside = name if alone else beside
        chained = own is not plain and not alone
        made, less = evaluation(found, name), found["ways"][beside]["seconds"]
        rows.append(
            [
                name,
                "1" if own is plain else around(ratio(own["seconds"], plain["seconds"])),
                around(ratio(own["seconds"], less)) if chained else "",
                f"{100 * own['flops']:.0f} %",
                f"{own['tokens']:.0f}",
                percent(made.mean),
                percent(made.minus(evaluation(found, beside)), signed=True) if chained else "",
            ]
        )
    setting = found["setting"]
    scenes = {group for _, _, group in found["samples"]}
    more = (
        f"times of {setting['pictures']} pictures with answers of {setting['tokens']} tokens",
        f"accuracy of {len(found['samples'])} questions about {len(scenes)} scenes",
    )
    return f"{table(heads, rows)}\n\n{about(setting, *more)}."


def measured(
    count: int, limit: int | None, results: Path | None, console: Console
) -> dict[str, Any]:
    """Both times and accuracies."""
    with quiet():
        loaded = Loaded(*embedded.load())
        taken = timed(loaded, pictures(count))
        found: dict[str, Any] = {}
        for name, pruner in ways().items():
            one = evaluate(loaded, pruner, Scenes(), limit=limit, batch=BATCH)
            found[name] = {"seconds": taken[name], **figures(one)}
            console.print(f"{name}: {percent(one.mean)} per cent", highlight=False)
    samples = [[one.id, one.kind, one.group] for one in Scenes().samples(limit)]
    setting = {"pictures": count, "tokens": TOKENS, "batch": BATCH}
    made = content(CPU, setting, samples=samples, ways=found)
    save(results, made)
    return made


def main(
    count: Annotated[int, typer.Option(help="Pictures that are timed.", min=2)] = 16,
    questions: Annotated[
        int | None, typer.Option(help="Questions that are scored; all by default.", min=1)
    ] = None,
    quick: Annotated[bool, typer.Option(help="2 pictures and 64 questions.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure whole calls and answers."""
    torch.set_num_threads(1)
    if quick:
        count, questions = 2, 64
    print(markdown(measured(count, questions, json_path, Console())))


if __name__ == "__main__":
    command(main)()
