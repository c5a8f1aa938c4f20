"""The figures of docs/serving.md, out of what `serve.py` wrote; `render.py` puts them there.

Of what was measured on a CPU there are ratios alone. The curve is docs/serving.png.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_parts import around, table
from turns import ratio
from vlmprune.study.bench.tables import on_gpu

FILES = {"serve-gpu": "On a GPU", "serve": "On a CPU"}
"""JSON files, in order, and their headings."""
ALL, PLAIN = "all", "plain"
_COLOURS = {"closed": "#0072B2", "cached": "#E69F00", "flops": "#6B7280"}
_DPI = 150
# What part of the processor time others may take, that it need not be said, and that times are
# shown: the server computes in few threads, and half of the machine is left for them.
QUIET, LOUD = 0.1, 0.5
POLLING = ("VLLM::EngineCor",)
"""Processes, as Linux cuts their names, that take processor time while they wait."""

Content = Mapping[str, Any]


class Results:
    """One file's figures."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.setting: Content = content["setting"]
        self.cases: Content = content["cases"]
        self.rounds: Sequence[Content] = content["rounds"]
        self.gpu = on_gpu(content)

    def values(self, load: str, case: str, *path: str) -> list[float]:
        """A figure of a case in every round."""
        out = []
        for one in self.rounds:
            value: Any = one[load][case]
            for name in path:
                value = value[name]
            out.append(float(value))
        return out

    def median(self, load: str, case: str, *path: str) -> float:
        """The median over rounds."""
        return statistics.median(self.values(load, case, *path))

    def against(
        self, load: str, case: str, *path: str, base: str = ALL, base_load: str | None = None
    ) -> tuple[float, float]:
        """How a case stands to another in the same rounds, and the spread."""
        return ratio(self.values(load, case, *path), self.values(base_load or load, base, *path))

    def processor(self, load: str, case: str) -> list[float]:
        """Processor time of the server for a request, in every round.

        Without that of the engine core, which asks again and again whether the worker is done.
        """
        told = [one[load][case] for one in self.rounds]
        return [
            sum(s for name, s in x["processor_seconds"].items() if name not in POLLING)
            / x["requests"]
            for x in told
        ]

    def cheaper(self, case: str, load: str = "closed") -> tuple[float, float] | None:
        """How many times less processor time a request takes than unpruned; None if unknown."""
        full = self.processor(load, ALL)
        return ratio(full, self.processor(load, case)) if all(full) and not self.gpu else None

    def gains(self, load: str, case: str) -> dict[str, tuple[float, float]]:
        """How many times better than unpruned, by what can be told: requests, processor time."""
        out = {}
        if self.timed():
            out["requests/s"] = self.against(load, case, "requests_per_second")
        less = self.cheaper(case, load)
        return out | ({"requests per processor second": less} if less else {})

    def others(self) -> float | None:
        """What part of the processor time others on the machine took; None where unknown."""
        every = [told for one in self.rounds for load in one.values() for told in load.values()]
        if self.gpu or not all(told.get("processor_seconds") for told in every):
            return None
        whole = sum(told["machine"]["busy_seconds"] for told in every)
        ours = sum(
            told["machine"]["client_seconds"] + sum(told["processor_seconds"].values())
            for told in every
        )
        return max(0.0, 1 - ours / whole) if whole else None

    def timed(self) -> bool:
        """Whether others left the machine alone, so that times say something."""
        return (self.others() or 0.0) <= LOUD

    def budgets(self) -> list[str]:
        """Cases of the pruning server, most tokens first."""
        return [name for name in self.cases if name != PLAIN]

    def loads(self) -> list[str]:
        """Open loads in the order that they were measured."""
        return [name for name in self.rounds[0] if name.startswith("open ")]

    def length(self, case: str) -> int:
        """Tokens of a request at its end."""
        told = [self.median("closed", case, name) for name in ("prompt_tokens", "output_tokens")]
        return round(sum(told))

    def kept(self, case: str) -> int:
        """Visual tokens of a request."""
        return int(self.cases[case]["visual_tokens"])

    def blocks(self, case: str) -> int:
        """KV blocks that a request takes at its end; its last token is never stored."""
        return math.ceil((self.length(case) - 1) / self.setting["block_tokens"])

    def fitting(self, case: str) -> int:
        """Requests that the cache holds at once."""
        return int(self.setting["blocks"]) // self.blocks(case)

    def flops(self, case: str) -> float | None:
        """How many times fewer FLOPs a request takes, by the formulas."""
        one, other = (self.cases[name].get("flops") for name in (case, ALL))
        return other / one if one and other else None

    def encoder_share(self, case: str) -> float:
        """What part of a request it spares not to prepare and encode a picture.

        Of processor time, where it is known, else of the time that requests take under full load.
        """
        if self.cheaper(case):
            return 1 - ratio(self.processor("cached", case), self.processor("closed", case))[0]
        name = "requests_per_second"
        return 1 - self.against("closed", case, name, base=case, base_load="cached")[0]


def section(content: Content) -> str:
    """One file's tables."""
    one = Results(content)
    parts = [about(one), capacity(one), reading(one)]
    if one.rounds[0].get("cached"):
        parts.append(cached(one))
    parts += [opened(one)] if one.loads() and one.timed() else []
    return "\n\n".join(parts)


def about(one: Results) -> str:
    """What was measured with what."""
    told = one.setting
    versions = ", ".join(f"{name} {value}" for name, value in told["versions"].items())
    extra = "".join(f", {name}={value}" for name, value in told["environment"].items())
    return (
        f"`{told['command']}`: {told['model']}, {told['weights']}; `VLMPRUNE={told['method']}`; "
        f"{told['device']}{extra}; {versions}; vLLM with `{told['arguments']}`. A picture and "
        f"{told['words']} words a question, {told['output_tokens']} tokens an answer; "
        f"{told['blocks']} KV blocks of {told['block_tokens']} tokens; {told['policy']}. "
        f"{len(one.rounds)} rounds, all cases in turn in each; ratios within a round, their median "
        "and half the distance between the quartiles."
    )


def capacity(one: Results) -> str:
    """Closed load: the table of kept tokens."""
    heads = ["visual tokens", "KV blocks a request", "requests that fit", "at once, most"]
    heads += ["requests/s"] if one.gpu else []
    heads += [f"{name} ÷ unpruned" for name in one.gains("closed", ALL)]
    heads += ["FLOPs, unpruned ÷ this"]
    heads += ["first token", "between tokens"] if one.timed() else []
    lines = []
    names = [*one.budgets(), *([PLAIN] if PLAIN in one.cases else [])]
    for name in names:
        label = str(one.kept(name))
        label += {ALL: ", unpruned", PLAIN: ", without the plugin"}.get(name, "")
        cells = [label, str(one.blocks(name)), str(one.fitting(name))]
        cells.append(f"{one.median('closed', name, 'in_use', 'running', 'peak'):.0f}")
        if one.gpu:
            cells.append(f"{one.median('closed', name, 'requests_per_second'):.2f}")
        cells += [around(made) for made in one.gains("closed", name).values()]
        flops = one.flops(name)
        cells.append("" if flops is None else f"{flops:.2f}")
        if one.timed():
            for path in (("first_token", "p50"), ("between_tokens", "p50")):
                cells.append(around(one.against("closed", name, *path)))
        lines.append(cells)
    latencies = " The latencies are medians, relative to the unpruned ones." if one.timed() else ""
    return (
        f"**Closed load, {one.setting['clients']} clients, each picture new**: what the server "
        f"gives when it is never idle.{latencies}\n\n" + table(heads, lines)
    )


def reading(one: Results) -> str:
    """What the table says, in words that follow from the figures."""
    least = min(one.budgets(), key=one.kept)
    lines = []
    promised = one.flops(least)
    if promised is not None:
        gains = one.gains("closed", least)
        told = " and ".join(f"{around(made)} times the {name}" for name, made in gains.items())
        shares = (f"{100 * (made - 1) / (promised - 1):.0f} %" for made, _ in gains.values())
        lines.append(
            f"- With {one.kept(least)} of {one.kept(ALL)} visual tokens the server has {told}. "
            f"FLOPs (of tower, prompt and answer) promise {promised:.2f}: of the promised gain "
            f"{' and '.join(shares)} arrive."
        )
    if PLAIN in one.cases:
        gains = one.gains("closed", PLAIN)
        told = " and ".join(f"{around(made)} times the {name}" for name, made in gains.items())
        lines.append(f"- vLLM without the plugin has, unpruned, {told} of the same with it.")
    others = one.others() or 0.0
    if others > QUIET:
        lines.append(
            f"- Other programs took {100 * others:.0f} % of the machine's processor time "
            "meanwhile. "
            + (
                "The server's own processor time bears that better than times do."
                if one.timed()
                else "Times say nothing then and are left out: what is shown is how many requests "
                "the server answers in a second of its own processor time."
            )
        )
    every = [told for done in one.rounds for load in done.values() for told in load.values()]
    asked, errors = (sum(told[name] for told in every) for name in ("requests", "errors"))
    hits = sum(told["counts"]["prefix_cache_hits"] for told in every)
    lines.append(f"- {asked} requests, {errors} errors, {hits:.0f} tokens from the prefix cache.")
    return "\n".join(lines)


def cached(one: Results) -> str:
    """The same picture for all questions."""
    heads = ["visual tokens", *(f"{name} ÷ unpruned" for name in one.gains("cached", ALL))]
    heads.append("encoding's share of a new picture")
    lines = []
    for name in one.budgets():
        cells = [str(one.kept(name)), *(around(x) for x in one.gains("cached", name).values())]
        lines.append([*cells, f"{100 * one.encoder_share(name):.0f} %"])
    return (
        "**The same picture, other questions**: the picture is prepared and encoded once, and what "
        "is left is what pruning shortens. Beside it the share of a request's time, under the load "
        "above, that a new picture's preparation and encoding take, which pruning leaves whole.\n\n"
        + table(heads, lines)
    )


def opened(one: Results) -> str:
    """Open loads."""
    heads = ["load", "visual tokens", "first token p50", "p95", "between tokens p50", "p95"]
    heads += ["requests/s", "KV blocks, mean", "most"]
    lines = []
    paths = [(name, q) for name in ("first_token", "between_tokens") for q in ("p50", "p95")]
    paths += [("requests_per_second",)]
    paths += [("in_use", "blocks", what) for what in ("mean", "peak")]
    for load in one.loads():
        for name in one.rounds[0][load]:
            cells = [load.removeprefix("open "), str(one.kept(name))]
            if name == ALL:
                blocks = (one.median(load, ALL, *path) for path in paths[-2:])
                cells += ["1"] * (len(paths) - 2) + [f"{value:.1f} blocks" for value in blocks]
            else:
                cells += [around(one.against(load, name, *path)) for path in paths]
            lines.append(cells)
    seconds = ""
    if one.gpu:
        told = [
            f"{load.removeprefix('open ')}: "
            f"{1e3 * one.median(load, ALL, 'first_token', 'p50'):.0f} ms"
            for load in one.loads()
        ]
        seconds = f" Unpruned first tokens, median: {', '.join(told)}."
    return (
        "**Open load**: requests arrive at random, at so many times the rate that the unpruned "
        "server answers under closed load, each with a new picture; arrivals are the same for all "
        f"cases. Relative to unpruned at the same load.{seconds}\n\n" + table(heads, lines)
    )


def plot(content: Content) -> bytes:
    """Served throughput against kept tokens, as a PNG."""
    from matplotlib.figure import Figure

    one = Results(content)
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    names = one.budgets()
    kept = [one.kept(name) for name in names]
    labels = {"closed": "each picture new", "cached": "same picture, other questions"}
    for load, label in labels.items():
        if not one.rounds[0].get(load):
            continue
        for number, what in enumerate(one.gains(load, ALL)):
            made = [one.gains(load, name)[what] for name in names]
            axes.errorbar(
                kept,
                [m for m, _ in made],
                yerr=[0.0 if math.isnan(s) else m * s for m, s in made],
                fmt=("o-", "s:")[number],
                capsize=3,
                color=_COLOURS[load],
                label=f"{what}, {label}",
            )
    promised = [one.flops(name) for name in names]
    if all(promised):
        axes.plot(kept, promised, "--", color=_COLOURS["flops"], label="FLOPs, tower included")
    axes.set_xscale("log", base=2)
    axes.set_xticks(kept, [str(n) for n in kept])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(color="#E4E7EB")
    axes.set_xlabel("visual tokens kept of a picture")
    axes.set_ylabel("times better than unpruned")
    axes.set_title(f"{one.setting['model']}, {one.setting['device']}", fontsize=10, loc="left")
    axes.legend(frameon=False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": "vlmprune serve"})
    return target.getvalue()


def parts(files: Mapping[str, Content]) -> dict[str, str]:
    """The part of docs/serving.md, where one of the files is there."""
    made = [f"### {FILES[name]}\n\n{section(files[name])}" for name in FILES if name in files]
    return {"serve": "\n\n".join(made)} if made else {}


def draw(files: Mapping[str, Content], target: Path) -> None:
    """Write the curve of the first of the files, if one is there."""
    for name in FILES:
        if name in files:
            target.write_bytes(plot(files[name]))
            return
