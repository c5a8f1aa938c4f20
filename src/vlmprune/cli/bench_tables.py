"""What `vlmprune bench` prints: one method in detail, or several in a line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmprune.cli.printing import bare_table, console, flops, mib
from vlmprune.study.bench.page import on_gpu, saved, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from vlmprune.study.bench.run import Figures, Result, Spread


def print_results(results: list[Result], content: dict[str, Any]) -> None:
    """A table for each run, and what the figures depend on."""
    from rich.text import Text

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
    for line in [*lines, *setting(content).split("; ")[:2]]:
        out.print(line, style="dim", markup=False, soft_wrap=True)


def _details(result: Result, gpu: bool) -> Table:
    """One method beside all tokens: ratios first, then what they come from."""
    from rich.text import Text

    full, one = result.full, result.methods[0]
    floor = result.floor(one)
    ways = (full, one, *(way for way in dict.fromkeys(floor or ()) if way is not full))
    table = bare_table(*(way.name for way in ways))

    def row(name: str, show: Callable[[Figures], str], change: Callable[[Figures], str]) -> None:
        cells = [Text(show(full))]
        cells += [Text(f"{change(way):>6}  {show(way)}".rstrip()) for way in ways[1:]]
        table.add_row(name, *cells)

    def times(name: str, ratio: str, rate: bool = False) -> None:
        def show(way: Figures) -> str:
            spread = getattr(way, name)
            if spread is None or gpu:
                return _rate(spread) if rate else _time(spread)
            return _share(spread).strip()

        row(name_of[name], show, lambda way: _times(way.against(full)[ratio]))

    def sizes(name: str, show: Callable[[Any], str]) -> None:
        row(
            name_of[name],
            lambda way: show(getattr(way, name)),
            lambda way: saved(getattr(full, name), getattr(way, name)),
        )

    name_of = {
        "visual_tokens": "visual tokens",
        "first_ms": "first token",
        "prefill_ms": "  prefill",
        "decode_tokens_per_second": "decode",
        "total_ms": "total",
        "visual_kv_bytes": "visual KV",
        "cache_bytes": "whole cache",
        "peak_bytes": "peak memory",
        "flops": "FLOPs",
    }
    sizes("visual_tokens", str)
    times("first_ms", "first_token_speedup")
    times("prefill_ms", "prefill_speedup")
    row(
        "  selecting",
        lambda way: _time(way.selecting_ms) if gpu else "",
        lambda way: _percent(way.against(full)["selecting_share"]),
    )
    times("decode_tokens_per_second", "decode_speedup", rate=True)
    times("total_ms", "total_speedup")
    if floor is not None:
        row(
            "x floor",
            lambda way: "",
            lambda way: f"{one.over(*floor)['first_token']:.2f}" if way is one else "",
        )
    sizes("visual_kv_bytes", mib)
    sizes("cache_bytes", mib)
    if full.peak_bytes is not None:
        sizes("peak_bytes", lambda size: mib(size or 0))
    sizes("flops", flops)
    row(
        "same first",
        lambda way: "",
        lambda way: (
            _same(way.against(full)["same_first_tokens"], result.batch) if way is one else ""
        ),
    )
    return table


def _overview(result: Result, gpu: bool) -> Table:
    """Several methods, a line each: ratios alone."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    full = result.full
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    titles = ["visual\ntokens", "first\ntoken", "pre-\nfill", "decode", "total"]
    titles += ["x\nfloor", "selec-\nting", "visual\nKV", "FLOPs"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    if gpu:
        times = [_time(full.first_ms, False), _time(full.prefill_ms, False)]
        decode = full.decode_tokens_per_second
        times += ["" if decode is None else f"{decode.median:.0f}/s", _time(full.total_ms, False)]
        table.add_row(full.name, str(full.visual_tokens), *times, "", "", "", "")
    for one in result.methods:
        against, floor = one.against(full), result.floor(one)
        names = ("first_token", "prefill", "decode", "total")
        table.add_row(
            Text(one.name),
            str(one.visual_tokens),
            *(_times(against[f"{name}_speedup"]) for name in names),
            "" if floor is None else f"{one.over(*floor)['first_token']:.2f}",
            _percent(against["selecting_share"]),
            *(
                saved(getattr(full, name), getattr(one, name)) or "="
                for name in ("visual_kv_bytes", "flops")
            ),
        )
    return table


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2g} %"


def _time(spread: Spread | None, around: bool = True) -> str:
    if spread is None:
        return ""
    return f"{spread.median:.1f} ms{_share(spread) if around else ''}"


def _rate(spread: Spread | None) -> str:
    if spread is None:
        return "–"  # noqa: RUF001 - a dash, as tables have
    return f"{spread.median:.1f} tok/s{_share(spread)}"


def _share(spread: Spread) -> str:
    return f" ±{100 * spread.share:.0f} %" if len(spread.values) > 1 else ""


def _same(count: int, rows: int) -> str:
    if rows == 1:
        return "yes" if count else "no"
    return f"{count} of {rows}"
