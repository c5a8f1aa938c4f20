"""The application: its mistakes are one sentence each."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vlmprune.errors import VlmpruneError
from vlmprune.files import FULL, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

# Typer has Click inside since 0.26 and beside it before; this is the class of both.
_UsageError: Any = typer.BadParameter.__bases__[0]


# What a shell reports of a command that a closed pipe ended (128 + SIGPIPE), and of Ctrl-C.
CLOSED, INTERRUPTED = 141, 130
_STDOUT = "standard output"


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2, and Ctrl-C into code 130.

    A pipe that nobody reads any more ends the command without a word, with code 141.
    """
    try:
        yield
    except VlmpruneError as error:
        typer.echo(f"vlmprune: {error}", err=True)
        raise typer.Exit(2) from None
    except _UsageError as error:
        message = error.format_message().rstrip(".")
        where = error.ctx.command_path if error.ctx else "vlmprune"
        typer.echo(f"vlmprune: {message}; see `{where} --help`.", err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise typer.Exit(CLOSED) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        # Files of ours say so themselves, so that one without a name is where results are printed.
        typer.echo(f"vlmprune: {refused(error.filename or _STDOUT, error)}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """Run the command line, and write out what is still to be printed."""
    try:
        app()
    except KeyboardInterrupt:
        status: int | str | None = INTERRUPTED
    except SystemExit as ended:
        status = ended.code
    sys.exit(_printed() or status)


def _printed() -> int:
    """Flush the standard output, which Python would do with a traceback; 0, or an exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What it holds is given up, or Python would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return CLOSED
        typer.echo(f"vlmprune: {refused(_STDOUT, error)}", err=True)
        return 2
    return 0


class _Group(TyperGroup):
    """Commands whose mistakes are told in one sentence."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _mistakes():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _mistakes():
            return super().invoke(*args, **kwargs)


app = typer.Typer(
    name="vlmprune",
    cls=_Group,
    help="Keep the visual tokens that matter, on the vision-language model that you already have.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from vlmprune.version import __version__

        typer.echo(f"vlmprune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
