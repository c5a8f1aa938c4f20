"""A first run that shows what pruning does, measured on this machine's CPU.

    python scripts/first_run.py               # within 90 seconds on two cores
    python scripts/first_run.py --quick       # within 20: fewer layers of the shape
    python scripts/first_run.py --json FILE   # all figures, too

Three parts: one answer with all visual tokens and with a quarter of them; the time of a LLaVA-like
model of half a billion random weights with all, with a quarter, and at the floor, as `vlmprune
bench` measures it; and what the formulas say of LLaVA-NeXT-7B. On a CPU ratios alone are shown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.markup import escape

from vlmprune import VisPruner, costs, embedded
from vlmprune.cli.plan import plans_table
from vlmprune.cli.printing import bar, bare_table, console, encodable, notes
from vlmprune.costs.plan import plan
from vlmprune.costs.units import change, flops, mib, percent
from vlmprune.errors import VlmpruneError
from vlmprune.io import models, outputs, sources
from vlmprune.io.pictures import open_image
from vlmprune.study import measure, one_question
from vlmprune.study.bench import shapes, workload
from vlmprune.study.bench.results import BenchResult, Figures
from vlmprune.study.bench.run import compare

KEEP = 0.25
"""The share of the visual tokens that all three parts keep."""
SCENE, QUESTION = "coffee.jpg", "what is left of the apple?"
DRAWN = Path("demo-output/kept.png")
SHAPE, TEXT_TOKENS = "llava-0.5b", 64
VISUAL_TOKENS = (576, 2880)
"""One picture, and as many as LLaVA-NeXT cuts out of one: five."""
TURNS = 3, 1
"""Of each, for what takes long differs little from turn to turn."""
QUICK = 6, 3
"""Layers of the language model and of the tower with `--quick`: a quarter of either."""
PLANNED, FEWEST = "llava-next-7b", 29
"""The last part's model, and the smallest budget a crop of the published tables, of 576."""
BUSY = "the machine was busy with other work, so these ratios say little; run it again"
MARK = outputs.mark_of("first_run")
CPU = torch.device("cpu")
Say = Callable[[str], None]


def answered(say: Say, keep: int | float = KEEP) -> one_question.BothWays:
    """Ask the embedded model the same with and without pruning; draws what is kept in `DRAWN`."""
    say("Loading the embedded model…")
    loaded = models.load(sources.find_model(None), CPU, torch.float32)
    picture = open_image(embedded.scenes() / SCENE)
    inputs = models.prepare(loaded, [picture], QUESTION)
    pruner = VisPruner(keep=keep)
    both = one_question.answer_twice(loaded, pruner, inputs, 64, repeat=1, decode_tokens=0, say=say)
    (drawn,) = one_question.draw(loaded, inputs, [picture], both.report)
    # The same picture as `vlmprune run --save-overlay` writes, and may be replaced by it.
    outputs.Output(DRAWN, outputs.mark_of("run")).write_picture(drawn)
    return both


def fastest() -> tuple[torch.dtype, float]:
    """Which type this CPU multiplies matrices faster in, and bfloat16's time by float32's."""
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(n, 896, dtype=dtype) for n in (640, 4864))
        marks, watch = [], measure.Stopwatch(CPU)
        # The best of several, the first of which warms up.
        for _ in range(6):
            marks.append(watch.mark())
            torch.nn.functional.linear(left, right)
        marks.append(watch.mark())
        took[dtype] = min(map(watch.between, marks, marks[1:]))
    ratio = took[torch.bfloat16] / took[torch.float32]
    return (torch.bfloat16 if ratio < 1 else torch.float32), ratio


def timed(
    dtype: torch.dtype, layers: int | None, tower_layers: int | None, say: Say
) -> list[BenchResult]:
    """Time the shape with each number of visual tokens in its turns, after a light warm-up."""
    pruners = {"pruned": VisPruner(keep=KEEP)}
    works = workload.from_shape(
        *(SHAPE, pruners, CPU, dtype, [1], 1, VISUAL_TOKENS),
        text_tokens=TEXT_TOKENS,
        new_tokens=1,
        say=say,
        layers=layers,
        tower_layers=tower_layers,
    )
    return [
        compare(
            *(work, pruners, 1, turns),
            say=lambda what, work=work: say(f"{work.images} picture(s): {what}"),  # type: ignore[misc]
            floor=True,
            light=True,
        )
        for work, turns in zip(works, TURNS, strict=True)
    ]


def print_answer(both: one_question.BothWays) -> None:
    """The first part."""
    full, pruned = both.full, both.pruned
    same = "the same" if full.answer == pruned.answer else "another"
    heading(f"1. A quarter of the visual tokens, {same} answer")
    notes([f"{QUESTION}  (the embedded model, a small real VLM; {SCENE})", ""])
    table = bare_table("all tokens", "pruned", "")
    table.add_row("answer", *map(escape, (full.answer, pruned.answer)), same)
    for name, of, show in (
        ("visual tokens", "visual_tokens", str),
        ("visual KV", "kv_bytes", lambda size: f"{mib(size)} MiB"),
        ("LLM FLOPs", "decoder_flops", lambda count: f"{flops(count)}FLOPs"),
    ):
        before, after = (getattr(one, of) for one in (full, pruned))
        table.add_row(name, show(before), show(after), change(before, after))
    console().print(table)
    notes(["", "most of this model is its vision tower, so what it saves in time stands below"])
    notes([f"kept tokens drawn in {DRAWN}"])


def print_times(results: list[BenchResult], ratio: float, billions: float) -> None:
    """The second part."""
    one, five = results
    heading(f"2. The time, measured: a LLaVA of {billions:.2f} billion random weights")
    lines = [
        f"type: {one.dtype}; a matrix product in bfloat16 takes {ratio:.2f} of float32's time here",
        f"medians of {TURNS[0]} turns with one picture, of {TURNS[1]} with five, on "
        f"{torch.get_num_threads()} thread(s)",
        f"warmed up by the pruned prompts; {TEXT_TOKENS} words of text",
    ]
    if "layers" in one.model:
        lines.append(f"quick, so not the whole model: {one.model.rpartition('weights, ')[2]}")
    notes([*lines, ""])
    table = bare_table("all tokens", "pruned", "floor")

    def row(name: str, result: BenchResult, show: Callable[[Figures], str]) -> None:
        table.add_row(name, *map(show, ways(result)))

    def faster(result: BenchResult, name: str) -> Callable[[Figures], str]:
        return lambda way: f"{way.against(result.full)[f'{name}_speedup']:.2f}x"

    def saved(result: BenchResult) -> Callable[[Figures], str]:
        full = result.full.visual_kv_bytes
        return lambda way: change(full, way.visual_kv_bytes)

    row("one picture: visual tokens", one, lambda way: f"{way.visual_tokens:,}")
    row("  first token, sooner", one, faster(one, "first_token"))
    row("  language model, faster", one, faster(one, "prefill"))
    row("  visual KV", one, saved(one))
    row("five pictures: visual tokens", five, lambda way: f"{way.visual_tokens:,}")
    row("  language model, faster", five, faster(five, "prefill"))
    row("  its FLOPs by formula, fewer", five, lambda way: f"{fewer(five, way):.2f}x")
    row("  visual KV", five, saved(five))
    console().print(table)
    if crowded() or any(not 0.8 < steady(result) < 1.25 for result in results):
        notes(["", BUSY])
    share = one.methods[0].against(one.full)["selecting_share"]
    notes(
        [
            "",
            "first token: the whole call, encoder and choosing included",
            "language model: its layers on the prompt alone; FLOPs: of the visual tokens",
            "floor: nothing is chosen, the prompt has as few tokens from the start",
            f"choosing takes {percent(share, '.2f')} of the unpruned call with one picture",
        ]
    )


def ways(result: BenchResult) -> tuple[Figures, Figures, Figures]:
    """All tokens, pruned, and the floor of that."""
    (pruned,) = result.methods
    (floor,) = result.floors
    return result.full, pruned, floor


def crowded() -> bool:
    """Whether more wanted to run in the last minute than there are cores, where that is told."""
    told = getattr(os, "getloadavg", None)
    return told is not None and told()[0] > (os.cpu_count() or 1) + 0.5


def steady(result: BenchResult) -> float:
    """The pruned prefill's time by the floor's, whose work is the same: 1 on a quiet machine."""
    _, pruned, floor = ways(result)
    return pruned.over(floor, floor)["prefill"] or 1.0


def fewer(result: BenchResult, way: Figures) -> float:
    """How many times fewer FLOPs the language model's prefill takes, by the published formula."""
    text = shapes.config_of(SHAPE).text_config
    whole, few = (costs.prefill_flops(text, n.visual_tokens) for n in (result.full, way))
    return whole / few


def heading(text: str) -> None:
    """A line above a part."""
    console().print(f"\n{text}\n", style="bold", markup=False, soft_wrap=True)


def main(words: list[str] | None = None) -> None:
    """Run and print the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers, within 20 seconds")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file, too")
    parser.add_argument("--force", action="store_true", help="overwrite any such file")
    given = parser.parse_args(words)
    layers, tower_layers = QUICK if given.quick else (None, None)
    file = None
    if given.json is not None:
        file = outputs.Output(outputs.named(given.json, "--json", ".json"), MARK, given.force)
    outputs.claim((file, outputs.Output(DRAWN, outputs.mark_of("run"))))
    done = 0
    # The answer, the model; of each number of tokens the warm-up and three ways a turn.
    expected = 4 + 1 + sum(1 + 3 * turns for turns in TURNS)
    with models.quiet():
        with bar() as drawn:

            def say(what: str) -> None:
                nonlocal done
                drawn(what, done, expected)
                done += 1

            both = answered(say)
        print_answer(both)
        dtype, ratio = fastest()
        with bar() as drawn:
            results = timed(dtype, layers, tower_layers, say)
        billions = shapes.parameters(shapes.config_of(SHAPE)) / 1e9
        print_times(results, ratio, billions)
    plans = [plan(PLANNED, keep) for keep in (KEEP, FEWEST)]
    heading(f"3. By formula, the same for {PLANNED}")
    notes([f"a picture of 672 x 672; a quarter of each crop's tokens, then {FEWEST} a crop", ""])
    console().print(plans_table(plans, costs.PER_MULTIPLY_ADD))
    if file is not None:
        content = {"made_by": MARK, "quick": given.quick, **measure.facts(CPU)}
        content |= {"question": QUESTION, "answers": both.as_dict()}
        content |= {"parameters_in_billions": billions, "bfloat16_by_float32": ratio}
        content |= {"runs": [one.as_dict() for one in results]}
        content |= {"plans": [one.as_dict() for one in plans]}
        file.write_json(content)
        notes(["", f"all figures are in {file.path}"])


if __name__ == "__main__":
    encodable(sys.stdout)
    encodable(sys.stderr)
    try:
        main()
    except VlmpruneError as error:
        sys.exit(f"vlmprune: {error}")
