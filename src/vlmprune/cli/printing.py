"""Where and how the commands print: results on stdout, what goes on meanwhile on stderr."""

from __future__ import annotations

import codecs
import io
import json
import shlex
import sys
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from vlmprune.costs.units import ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console
    from rich.table import Table


# What stands in tables and sentences, for terminals that lack it; each one character wide, so that
# columns stay where they are.
_PLAIN = str.maketrans("→–—…×±≤≥−“”‘’│─", ">--~x+<>-\"\"''|-")  # noqa: RUF001
_ERRORS = "vlmprune.plain"


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """What to print of characters that a terminal's encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    plain = unicodedata.normalize("NFKD", part.translate(_PLAIN))
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end


def encodable(stream: TextIO) -> None:
    """Let a stream print everything, though its encoding may lack some characters."""
    # What stands in for a terminal, as in notebooks, need not have an encoding to set.
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error(_ERRORS, _in_plain)
        stream.reconfigure(errors=_ERRORS)


def console(to_stderr: bool = False) -> Console:
    """The terminal."""
    from rich.console import Console

    return Console(stderr=to_stderr, highlight=False)


@contextmanager
def progress(message: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on; nothing where stderr is no terminal."""
    from rich.markup import escape

    # Drawn seldom, since timing goes on meanwhile.
    with console(to_stderr=True).status(message, refresh_per_second=4) as status:
        yield lambda text: status.update(escape(text))


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, told what goes on, and how much of how much is done.

    Nothing where stderr is no terminal.
    """
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(to_stderr=True)
    # Drawn seldom, since timing goes on meanwhile.
    with Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=out,
        transient=True,
        refresh_per_second=4,
        disable=not out.is_terminal,
    ) as drawn:
        number = drawn.add_task("")
        yield lambda message, done, total: drawn.update(
            number, description=escape(message), completed=done, total=total
        )


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout; null for what is unknown."""
    # What a terminal cannot show comes in JSON's own escapes, which lose nothing.
    whole = codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")
    typer.echo(json.dumps(ready(content), indent=2, ensure_ascii=not whole))


def notes(lines: Iterable[str]) -> None:
    """What the figures above depend on, and where files went, a line each."""
    out = console()
    for line in lines:
        out.print(line, style="dim", markup=False, soft_wrap=True)


def ruled_table(collapse_padding: bool = False) -> Table:
    """A table with one line, below its headings."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=collapse_padding
    )


def figures_table(name: str, figures: Iterable[str], least: int | None = None) -> Table:
    """A table with a column of names, which fold, and columns of figures, which do not.

    Args:
        name: heading of the names.
        figures: headings of the figures.
        least: characters that the names have at least.
    """
    table = ruled_table(collapse_padding=True)
    table.add_column(name, overflow="fold", min_width=least)
    for title in figures:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def bare_table(*ways: str) -> Table:
    """A table with a column of names and one for each way, the pruned ones in bold."""
    from rich.text import Text

    table = ruled_table()
    table.add_column("", style="dim", no_wrap=True)
    for number, way in enumerate(ways):
        table.add_column(Text(way), style="bold" if number else "", overflow="fold")
    return table


def plain_grid(title: str) -> Table:
    """A table without lines and headings, below a title."""
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def typed(context: typer.Context) -> str:
    """The command as it was given."""
    given: list[str] = []
    for one in context.command.params:
        source = context.get_parameter_source(one.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[one.name or ""]
        if isinstance(value, bool):
            option = max(one.opts, key=len)
            given.append(option if value else (one.secondary_opts or [option])[0])
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            named = one.param_type_name == "option"
            given += [max(one.opts, key=len), str(item)] if named else [str(item)]
    return shlex.join(["vlmprune", str(context.info_name), *given])
