"""The application: its mistakes are one sentence each."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmprune.cli.printing import encodable
from vlmprune.errors import VlmpruneError
from vlmprune.files import FULL, refused, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Typer has Click inside since 0.26 and beside it before; this is the class of both.
_UsageError: Any = typer.BadParameter.__bases__[0]


# What a shell reports of a command that a closed pipe ended (128 + SIGPIPE), and of Ctrl-C.
CLOSED, INTERRUPTED = 141, 130
_STDOUT = "standard output"


def _on_one_line(text: str) -> str:
    """A sentence whose words of the user's hold no line break, and nothing that acts on terminals.

    Bytes that are no text stay, for the stream to print.
    """
    return "".join(
        one if one.isprintable() or "\udc80" <= one <= "\udcff" else repr(one)[1:-1] for one in text
    )


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2, and Ctrl-C into code 130.

    A pipe that nobody reads any more ends the command without a word, with code 141.
    """
    try:
        yield
    except VlmpruneError as error:
        typer.echo(f"vlmprune: {_on_one_line(str(error))}", err=True)
        raise typer.Exit(2) from None
    except _UsageError as error:
        message = _on_one_line(error.format_message()).rstrip(".")
        where = error.ctx.command_path if error.ctx else "vlmprune"
        see = "; see" if not message.endswith("?") else " See"
        typer.echo(f"vlmprune: {message}{see} `{where} --help`.", err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise typer.Exit(CLOSED) from None
    except SystemExit as ended:
        # What Rich makes of a closed pipe, in tables and in the help, which Typer lets it print.
        if isinstance(ended.__context__, BrokenPipeError):
            raise typer.Exit(CLOSED) from None
        raise
    except OSError as error:
        # Files of ours say so themselves, so that one without a name is where results are printed.
        if error.errno in FULL:
            told = refused(error.filename or _STDOUT, error)
        elif error.filename is not None:
            told = unreadable(error.filename, error)
        else:
            raise
        typer.echo(f"vlmprune: {told}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """Run the command line, and write out what is still to be printed."""
    for name in ("stdout", "stderr"):
        # Python has none where the shell closed it (`>&-`).
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        encodable(getattr(sys, name))
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


def _unflagged(params: list[Any]) -> list[Any]:
    """The parameters, of which switches tell no type in the help, for they take no value."""
    for one in params:
        if one.param_type_name == "option" and one.is_flag and one.metavar is None:
            one.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help tells types of what takes a value alone."""

    def get_params(self, *args: Any, **kwargs: Any) -> Any:
        """The parameters, as a help page and a parser want them."""
        return _unflagged(super().get_params(*args, **kwargs))


class _Group(TyperGroup):
    """Commands whose mistakes are told in one sentence."""

    def get_params(self, *args: Any, **kwargs: Any) -> Any:
        return _unflagged(super().get_params(*args, **kwargs))

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
