"""`vlmprune bench`: speed and memory with and without pruning."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vlmprune.cli.options import AsJson, Device, Dtype, Model
from vlmprune.cli.printing import bare_table, console, flops, less, mib, print_json, progress
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.table import Table

    from vlmprune.bench import Figures, Result, Spread


def bench(
    context: typer.Context,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer reads this at run time, on Python 3.10 too
        typer.Option(
            metavar="SPEC",
            help="A method with its settings, as vispruner:keep=64 (the default) or "
            "vispruner:keep=64+plphp:r=0.4; may be given several times.",
        ),
    ] = None,
    model: Model = None,
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Instead of a model, its class with random weights in this shape: small (for a "
            "CPU), llava-1.5-7b, llava-next-7b, …"
        ),
    ] = None,
    images: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="N|FILE",
            help="Pictures of each prompt: how many (1 by default), or a file, which may be given "
            "several times.",
        ),
    ] = None,
    visual_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="With --shape: as many pictures as have this many visual tokens."),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="With --shape: words of each prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens that every call generates, end tokens ignored.")
    ] = 32,
    repeat: Annotated[int, typer.Option(help="Turns, of which the medians count.")] = 5,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Write all figures to a file, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory with and without pruning, in turns.

    Every call generates the same number of tokens, whatever it says. Compare ratios: times depend
    on the machine and on what else it does.
    """
    _check_together(shape, model, images, visual_tokens)
    with progress("Starting…") as say:
        from vlmprune import bench as benching
        from vlmprune import loading, measure, sources, work

        with loading.quiet():
            pruners = work.parse_methods(method or [f"vispruner:keep={sources.KEEP}"])
            sources.at_least_one(
                batch=batch, new_tokens=new_tokens, repeat=repeat, text_tokens=text_tokens
            )
            if visual_tokens is not None:
                sources.at_least_one(visual_tokens=visual_tokens)
            pictures = work.parse_images(images or ["1"])
            place = sources.choose_device(device)
            kind = sources.choose_dtype(dtype, place)
            target = None if out is None else sources.result_path(out)
            if shape is not None:
                made = work.from_shape(
                    *(shape, pruners, place, kind, batch, pictures, visual_tokens),
                    *(text_tokens, new_tokens, say),
                )
            else:
                source = sources.find_model(model)
                for pruner in pruners.values():
                    sources.check_budget(source, pruner)
                say(f"Loading {source.label}…")
                made = work.from_model(source, place, kind, batch, pictures)
            result = benching.compare(made, pruners, new_tokens, repeat, say)
            facts = measure.facts(place)
    command, arguments = _command(context)
    content = {"command": command, "arguments": arguments, **facts, **result.as_dict()}
    if as_json:
        print_json(content)
    else:
        _print_result(result, facts)
    if target is not None:
        _write(target, content)
        if not as_json:
            console().print(f"all figures are in {target}", markup=False, soft_wrap=True)


def _check_together(
    shape: str | None, model: str | None, images: list[str] | None, visual_tokens: int | None
) -> None:
    """Refuse options that do not go together."""
    if shape is None:
        if visual_tokens is not None:
            raise VlmpruneError(
                "--visual-tokens needs a --shape; a model's pictures have what they have."
            )
        return
    if model is not None:
        raise VlmpruneError("--shape and --model exclude each other; give one of them.")
    if images is not None and visual_tokens is not None:
        raise VlmpruneError("--images and --visual-tokens exclude each other; give one of them.")


def _command(context: typer.Context) -> tuple[str, dict[str, Any]]:
    """The command as it was given, and the value of every option."""
    given = []
    for one in context.command.params:
        source = context.get_parameter_source(one.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[one.name]
        option = max(one.opts, key=len)
        if isinstance(value, bool):
            given.append(option)
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            given += [option, str(item)]
    return shlex.join(["vlmprune", "bench", *given]), dict(context.params)


def _write(target: Path, content: dict[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise VlmpruneError(
            f"--out {str(target)!r} cannot be written ({error.strerror})."
        ) from error


def _print_result(result: Result, facts: dict[str, Any]) -> None:
    from rich.text import Text

    out = console()
    work = f"{result.batch} prompt(s) of {result.images} image(s), {result.prompt_tokens} tokens"
    out.print(Text.assemble((result.model, "bold"), f"; {work}; {result.new_tokens} new tokens"))
    out.print()
    out.print(_details(result) if len(result.methods) == 1 else _overview(result))
    out.print()
    versions = facts["versions"]
    lines = [
        f"medians of {result.repeat} turns ± half the distance between the quartiles",
        "prefill: time to the first token, encoder included; decode: the tokens after it",
        "visual KV, FLOPs: of the visual tokens; whole cache: all it holds at the end",
        f"{facts['device_name']}; {result.device}, {facts['threads']} thread(s), {result.dtype}",
        f"torch {versions['torch']}, transformers {versions['transformers']}",
    ]
    if len(result.methods) > 1:
        lines[0] = f"ratios of medians of {result.repeat} turns; --json has times and spreads"
    for line in lines:
        out.print(line, style="dim", markup=False)


def _details(result: Result) -> Table:
    """One method beside all tokens: ratios first, then what they come from."""
    from rich.text import Text

    full, one = result.full, result.methods[0]
    against = one.against(full)
    table = bare_table(full.name, one.name)

    def row(name: str, show: Callable[[Figures], str], change: str = "") -> None:
        table.add_row(name, Text(show(full)), Text(f"{change:>6}  {show(one)}"))

    def saved(name: str) -> str:
        return less(getattr(full, name), getattr(one, name))

    row("visual tokens", lambda m: str(m.visual_tokens), saved("visual_tokens"))
    row("prefill", lambda m: _time(m.first_ms), _times(against["prefill_speedup"]))
    row("  selecting", lambda m: _time(m.selecting_ms))
    row("decode", lambda m: _rate(m.decode_tokens_per_second), _times(against["decode_speedup"]))
    row("total", lambda m: _time(m.total_ms), _times(against["total_speedup"]))
    row("visual KV", lambda m: mib(m.visual_kv_bytes), saved("visual_kv_bytes"))
    row("whole cache", lambda m: mib(m.cache_bytes), saved("cache_bytes"))
    if full.peak_bytes is not None:
        row("peak memory", lambda m: mib(m.peak_bytes or 0), saved("peak_bytes"))
    row("FLOPs", lambda m: flops(m.flops), saved("flops"))
    same = _same(against["same_first_tokens"], result.batch)
    row("first token", lambda m: "" if m is full else same)
    return table


def _overview(result: Result) -> Table:
    """Several methods, a line each, and ratios alone."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    full = result.full
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    titles = ("visual\ntokens", "prefill", "decode", "total", "visual\nKV", "whole\ncache", "FLOPs")
    for title in (*titles, "first\ntoken"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in result.methods:
        against = one.against(full)
        table.add_row(
            Text(one.name),
            str(one.visual_tokens),
            *(_times(against[f"{name}_speedup"]) for name in ("prefill", "decode", "total")),
            *(
                less(getattr(full, name), getattr(one, name)) or "="
                for name in ("visual_kv_bytes", "cache_bytes", "flops")
            ),
            _same(against["same_first_tokens"], result.batch),
        )
    return table


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _time(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.1f} ms{_share(spread)}"


def _rate(spread: Spread | None) -> str:
    if spread is None:
        return "–"  # noqa: RUF001 - a dash, as tables have
    return f"{spread.median:.1f} tok/s{_share(spread)}"


def _share(spread: Spread) -> str:
    return f" ±{100 * spread.share:.0f} %" if len(spread.values) > 1 else ""


def _same(count: int, rows: int) -> str:
    if rows == 1:
        return "same" if count else "another"
    return f"{count} of {rows}"
