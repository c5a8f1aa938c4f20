"""`vlmprune bench`: speed and memory with and without pruning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import (
    AsJson,
    Device,
    Dtype,
    Force,
    Markdown,
    Model,
    Number,
    Numbers,
    Text,
    Texts,
)
from vlmprune.cli.printing import (
    bare_table,
    console,
    figures_table,
    notes,
    print_json,
    progress,
    typed,
)
from vlmprune.costs.units import UNKNOWN_WORD, change, flops, mib
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from vlmprune.study.bench.results import BenchResult, Figures

GPU, CPU = "measured on a GPU", "of a CPU: use the ratios only"
"""What the seconds in the JSON are."""


def bench(
    context: typer.Context,
    method: Annotated[
        Texts,
        typer.Option(
            metavar="SPEC",
            help="A method with its settings, as vispruner:keep=64 (the default) or "
            "vispruner:keep=64+plphp:r=0.4; may be given several times.",
        ),
    ] = None,
    model: Model = None,
    shape: Annotated[
        Text,
        typer.Option(
            help="Instead of a model, its class with random weights in this shape: small or "
            "llava-0.5b (for a CPU), llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, …"
        ),
    ] = None,
    layers: Annotated[
        Number, typer.Option(help="With --shape: only so many of the language model's layers.")
    ] = None,
    tower_layers: Annotated[
        Number, typer.Option(help="With --shape: only so many of the vision tower's layers.")
    ] = None,
    images: Annotated[
        Texts,
        typer.Option(
            metavar="N|FILE",
            help="Pictures of each prompt: how many (1 by default), or a file, which may be given "
            "several times.",
        ),
    ] = None,
    visual_tokens: Annotated[
        Numbers,
        typer.Option(
            help="With --shape: as many pictures as have this many visual tokens, or one of as "
            "many where the model takes any size; may be given several times."
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="With --shape: words of each prompt.")] = 64,
    batch: Annotated[
        Numbers, typer.Option(help="Prompts at once, 1 by default; may be given several times.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens that every call generates, end tokens ignored.")
    ] = 32,
    repeat: Annotated[int, typer.Option(help="Turns, of which the medians count.")] = 5,
    floor: Annotated[
        bool,
        typer.Option(
            help="Time the model with natively short prompts, too: as many visual tokens as are "
            "kept, nothing chosen, nothing attached."
        ),
    ] = True,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="On a CPU, measure peak memory (of tensors, by torch's profiler), too; it takes "
            "a slow call of each way.",
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Text, typer.Option(metavar="FILE.json", help="Write all figures to a file, too.")
    ] = None,
    markdown: Markdown = None,
    plot: Annotated[Text, typer.Option(metavar="FILE.png", help="Draw them, too.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory with and without pruning, in turns.

    Every call generates the same number of tokens, whatever it says. Compare ratios: times depend
    on the machine and on what else it does, and on a CPU ratios alone are shown. Beside the
    methods stands the floor, the same model given a natively short prompt.
    """
    _check_together(shape, model, images, visual_tokens, layers or tower_layers)
    with progress("Starting…") as say:
        from vlmprune.hosts.config import attention_implementation, of_text
        from vlmprune.io import models, options, outputs, sources
        from vlmprune.study import measure
        from vlmprune.study.bench import workload
        from vlmprune.study.bench.plot import MARK
        from vlmprune.study.bench.plot import plot as draw
        from vlmprune.study.bench.run import compare
        from vlmprune.study.bench.tables import markdown as tables_of

        with models.quiet():
            pruners = workload.parse_methods(method or [f"vispruner:keep={options.KEEP}"])
            batches, wanted = batch or [1], visual_tokens or []
            for number in batches:
                options.at_least_one(batch=number)
            options.at_least_one(new_tokens=new_tokens, repeat=repeat, text_tokens=text_tokens)
            for number in wanted:
                options.at_least_one(visual_tokens=number)
            pictures = workload.parse_images(images or ["1"])
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            target, page, drawing = (
                None
                if path is None
                else outputs.Output(outputs.named(path, option, ending), MARK, force)
                for path, option, ending in (
                    (out, "--out", ".json"),
                    (markdown, "--markdown", ".md"),
                    (plot, "--plot", ".png"),
                )
            )
            outputs.claim((target, page, drawing), images or ())
            if shape is not None:
                works = workload.from_shape(
                    *(shape, pruners, place, kind, batches, pictures, wanted),
                    *(text_tokens, new_tokens, say, layers, tower_layers),
                )
            else:
                source = sources.find_model(model)
                say(f"Loading {source.label}…")
                works = workload.from_model(source, place, kind, batches, pictures)
            results: list[BenchResult] = []
            content: dict[str, Any] = {
                "made_by": MARK,
                "command": typed(context),
                "arguments": dict(context.params),
                **measure.facts(place),
                "attention": "",
                "seconds_are": GPU if place.type == "cuda" else CPU,
                "runs": [],
            }
            for one in works:
                results.append(compare(one, pruners, new_tokens, repeat, say, floor, memory))
                content["attention"] = attention_implementation(of_text(one.model.config))
                content["runs"].append(results[-1].as_dict())
                if target is not None:
                    # A run that is stopped keeps what it has.
                    target.write_json(content)
            if page is not None:
                page.write(f"<!-- {MARK} -->\n\n{tables_of(content)}")
            if drawing is not None:
                drawing.write(draw(content))
    if as_json:
        print_json(content)
        return
    _print(results, content)
    told = ((target, "all figures are"), (page, "the table is"), (drawing, "the plot is"))
    for file, what in told:
        if file is not None:
            console().print(f"{what} in {file.path}", markup=False, soft_wrap=True)


def _check_together(
    shape: str | None,
    model: str | None,
    images: list[str] | None,
    visual_tokens: list[int] | None,
    layers: int | None,
) -> None:
    """Refuse options that do not go together."""
    if shape is None:
        if layers is not None:
            raise VlmpruneError(
                "--layers and --tower-layers need a --shape; a model has what it has."
            )
        if visual_tokens is not None:
            raise VlmpruneError(
                "--visual-tokens needs a --shape; a model's pictures have what they have."
            )
        return
    if model is not None:
        raise VlmpruneError("--shape and --model exclude each other; give one of them.")
    if images is not None and visual_tokens is not None:
        raise VlmpruneError("--images and --visual-tokens exclude each other; give one of them.")


def _print(results: list[BenchResult], content: dict[str, Any]) -> None:
    """A table for each run, and what the figures depend on."""
    from rich.text import Text

    from vlmprune.study.bench.tables import on_gpu, setting

    out, first = console(), results[0]
    gpu = on_gpu(content)
    for result in results:
        work = f"{result.batch} prompt(s) of {result.images} image(s), {result.prompt_tokens}"
        out.print(
            Text.assemble(
                (result.model, "bold"), f"; {work} tokens; {result.new_tokens} new tokens"
            )
        )
        out.print()
        single = len(result.methods) == 1
        out.print(_details(result, gpu) if single else _overview(result, gpu))
        if result.no_floor:
            out.print(f"no floor: {result.no_floor}", style="dim", markup=False)
        out.print()
    around = "± half the distance between the quartiles"
    lines = [
        f"medians of {first.repeat} turn(s) {around if len(first.methods) == 1 else ''}".strip()
    ]
    if len(first.methods) > 1:
        lines[0] += "; --json has all times and spreads"
    if not gpu:
        lines.append("a CPU's times say little, so speeds are ratios to all tokens")
    lines += [
        "first token: from the call to it, encoder included; prefill: language model",
        "selecting: share of the unpruned time to the first token",
    ]
    if first.floors:
        lines.append("x floor: time to the first token over that of a natively short prompt")
    if first.full.peak_bytes is None:
        lines.append("peak memory is not measured on a CPU without --memory")
    lines.append("visual KV, FLOPs: of the visual tokens")
    if any(_read_in_part(one) for result in results for one in result.methods):
        lines.append("visual KV: on the device; read: by a decode step; both with the sketches")
    notes([*lines, *setting(content).split("; ")[:2]])


def _details(result: BenchResult, gpu: bool) -> Table:
    """One method beside all tokens: ratios first, then what they come from."""
    from rich.text import Text

    from vlmprune.study.bench.tables import factor, selecting, spread, timed

    full, one = result.full, result.methods[0]
    floor = result.floor(one)
    ways = (full, one, *(way for way in dict.fromkeys(floor or ()) if way is not full))
    table = bare_table(*(way.name for way in ways))

    def row(name: str, show: Callable[[Figures], str], against: Callable[[Figures], str]) -> None:
        cells = [Text(show(full))]
        cells += [Text(f"{against(way):>6}  {show(way)}".rstrip()) for way in ways[1:]]
        table.add_row(name, *cells)

    def times(title: str, name: str, ratio: str, unit: str = "ms") -> None:
        def show(way: Figures) -> str:
            quartiles = getattr(way, name)
            if quartiles is None or gpu:
                return timed(quartiles, unit)
            return spread(quartiles).strip()

        row(title, show, lambda way: _times(way.against(full)[ratio]))

    def sizes(title: str, name: str, show: Callable[[Any], str]) -> None:
        row(
            title,
            lambda way: show(getattr(way, name)),
            lambda way: change(getattr(full, name), getattr(way, name)),
        )

    sizes("visual tokens", "visual_tokens", str)
    times("first token", "first_ms", "first_token_speedup")
    times("  prefill", "prefill_ms", "prefill_speedup")
    row(
        "  selecting",
        lambda way: timed(way.selecting_ms) if gpu and way is one else "",
        lambda way: selecting(way.against(full)["selecting_share"]),
    )
    times("decode", "decode_tokens_per_second", "decode_speedup", "tok/s")
    times("total", "total_ms", "total_speedup")
    if floor is not None:
        row(
            "x floor",
            lambda way: "",
            lambda way: factor(one.over(*floor)["first_token"] if way is one else None),
        )
    for title, name in (
        ("visual KV", "visual_kv_bytes"),
        *((("  on the host", "visual_host_bytes"),) if one.visual_host_bytes else ()),
        *((("  read by a step", "visual_read_bytes"),) if _read_in_part(one) else ()),
        ("whole cache", "cache_bytes"),
        ("peak memory", "peak_bytes"),
    ):
        if getattr(full, name) is not None:
            sizes(title, name, lambda size: f"{mib(size or 0)} MiB")
    sizes("FLOPs", "flops", lambda value: f"{flops(value)}FLOPs")
    row(
        "same first",
        lambda way: "",
        lambda way: (
            _same(way.against(full)["same_first_tokens"], result.batch) if way is one else ""
        ),
    )
    return table


def _overview(result: BenchResult, gpu: bool) -> Table:
    """Several methods, a line each: ratios alone."""
    from rich.text import Text

    from vlmprune.study.bench.tables import factor, selecting

    full = result.full
    titles = ["visual\ntokens", "first\ntoken", "pre-\nfill", "decode", "total"]
    titles += ["x\nfloor", "selec-\nting", "visual\nKV"]
    costs = ["visual_kv_bytes", "flops"]
    if any(map(_read_in_part, result.methods)):
        titles.append("visual KV\nread")
        costs.insert(1, "visual_read_bytes")
    titles.append("FLOPs")
    table = figures_table("", titles)
    if gpu:
        rate = full.decode_tokens_per_second
        first, prefill, total = (
            "" if one is None else f"{one.median:.1f} ms"
            for one in (full.first_ms, full.prefill_ms, full.total_ms)
        )
        times = [first, prefill, "" if rate is None else f"{rate.median:.0f}/s", total]
        table.add_row(full.name, str(full.visual_tokens), *times, "", "", *[""] * len(costs))
    for one in result.methods:
        against, floor = one.against(full), result.floor(one)
        names = ("first_token", "prefill", "decode", "total")
        table.add_row(
            Text(one.name),
            str(one.visual_tokens),
            *(_times(against[f"{name}_speedup"]) for name in names),
            factor(floor and one.over(*floor)["first_token"]),
            selecting(against["selecting_share"]),
            *(_less(getattr(full, name), getattr(one, name)) for name in costs),
        )
    return table


def _read_in_part(one: Figures) -> bool:
    return not math.isnan(one.visual_read_bytes) and one.visual_read_bytes != one.visual_kv_bytes


def _less(full: float, value: float) -> str:
    """What is saved, in a cell of its own."""
    if math.isnan(full) or math.isnan(value):
        return UNKNOWN_WORD
    return change(full, value) or "="


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _same(count: int, rows: int) -> str:
    if rows == 1:
        return "yes" if count else "no"
    return f"{count} of {rows}"
