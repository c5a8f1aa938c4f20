"""The command `vlmprune`: parses, and prints what other modules work out.

Nothing heavy is imported here before a command needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from vlmprune.running import Measured, Outcome

# Typer has Click inside since 0.26 and beside it before; this is the class of both.
_UsageError: Any = typer.BadParameter.__bases__[0]


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2, and Ctrl-C into code 130."""
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
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


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

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Budget = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads this at run time, on Python 3.10 too
    typer.Option(help='What --keep counts for: "crop" (each one) or "image" (all its crops).'),
]


def _version(wanted: bool) -> None:
    if wanted:
        from vlmprune import __version__

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


@app.command()
def run(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="One or more pictures.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(help="What to ask about them.", show_default=False)],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A model folder or an id of the Hub; by default the embedded model."),
    ] = None,
    method: Annotated[str, typer.Option(help="See `vlmprune methods`.")] = "vispruner",
    keep: Annotated[
        str, typer.Option(help="Visual tokens to keep, or a fraction such as 0.25.")
    ] = "64",
    important_ratio: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of them taken by attention; the rest is diverse."),
    ] = None,
    positions: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='"compact" renumbers, "original" keeps gaps, "auto" as the model wants.'),
    ] = None,
    budget: Budget = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    repeat: Annotated[int, typer.Option(help="Timed rounds, of which the medians count.")] = 3,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu, cuda, …; by default the GPU where there is one."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32, float16 or bfloat16; by default float32 on a CPU."),
    ] = None,
    save_overlay: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw the kept tokens on the picture."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about pictures, with and without pruning."""
    _check_question(question)
    with _progress("Starting…") as say:
        from vlmprune import running, sources

        with running.quiet():
            pruner = sources.make_pruner(
                method,
                {
                    "keep": _keep(keep),
                    "important_ratio": important_ratio,
                    "positions": positions,
                    "budget": budget,
                },
            )
            running.check_counts(max_new_tokens, repeat)
            pictures = sources.open_images(images)
            place = sources.choose_device(device)
            kind = sources.choose_dtype(dtype, place)
            source = sources.find_model(model)
            sources.check_budget(source, pruner)
            targets = sources.overlay_paths(save_overlay, images) if save_overlay else []
            say(f"Loading {source.label}…")
            loaded = running.load(source, place, kind)
            inputs = running.prepare(loaded, pictures, question)
            outcome = running.answer_twice(loaded, pruner, inputs, max_new_tokens, repeat, say)
            if targets:
                say("Drawing…")
                drawn = running.draw(loaded, inputs, pictures, outcome.report)
                sources.save(drawn, targets)
    if as_json:
        about = {"model": source.name, "images": images, "question": question}
        _print_json(about | outcome.as_dict() | {"overlays": [str(path) for path in targets]})
        return
    _print_outcome(source.label, method, question, outcome)
    for path in targets:
        _console().print(f"kept tokens drawn in {path}", markup=False, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="An architecture, or a folder with a config.json.")],
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Visual tokens to keep, or a fraction; by default all."),
    ] = None,
    budget: Budget = "crop",
    crops: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Crops of the image; by default 1, or 5 for LLaVA-NeXT."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a budget costs on an architecture, without its weights."""
    from vlmprune import plan as planning

    kept = None if keep is None else _keep(keep)
    costs = planning.plan(model, kept, budget or "crop", crops)  # type: ignore[arg-type]
    if as_json:
        _print_json(costs.as_dict())
    else:
        _console().print(planning.table([costs]))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods, what each needs and its settings."""
    from vlmprune import listing

    found = listing.methods()
    if as_json:
        _print_json(found)
        return
    for one in found["methods"]:
        _console().print(listing.method_table(one))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the supported models."""
    from vlmprune import listing

    found = listing.models()
    if as_json:
        _print_json(found)
    else:
        _console().print(listing.models_table(found))


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _check_question(question: str) -> None:
    from pathlib import Path

    if not question.strip() or Path(question).is_file():
        raise VlmpruneError(
            'the question is missing; give it last, as in: vlmprune run photo.jpg "What is this?"'
        )


def _keep(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise VlmpruneError(
        f"--keep {text} is not a number; use an integer of at least 1, or a fraction in (0, 1]."
    )


def _console(to_stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=to_stderr, highlight=False)


@contextmanager
def _progress(message: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on; nothing where stderr is no terminal."""
    # Drawn seldom, since timing goes on meanwhile.
    with _console(to_stderr=True).status(message, refresh_per_second=4) as status:
        yield status.update


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _print_outcome(model: str, method: str, question: str, outcome: Outcome) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    full, pruned, report = outcome.full, outcome.pruned, outcome.report
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("all tokens", overflow="fold")
    table.add_column(f"{method}", style="bold", overflow="fold")
    table.add_column("", style="green", justify="right", no_wrap=True)

    def row(name: str, show: Callable[[Measured], str], change: str) -> None:
        table.add_row(name, Text(show(full)), Text(show(pruned)), change)

    row("answer", lambda m: m.answer, "same" if full.answer == pruned.answer else "differs")
    row("visual tokens", lambda m: str(m.visual_tokens), _less(full, pruned, "visual_tokens"))
    row("prefill", lambda m: f"{m.prefill_ms:.1f} ms", f"{outcome.prefill_speedup:.2f}x")
    row("total", lambda m: f"{m.total_ms:.1f} ms", f"{outcome.total_speedup:.2f}x")
    row("KV cache", lambda m: f"{m.kv_bytes / 2**20:.2f} MiB", _less(full, pruned, "kv_bytes"))
    row("LLM FLOPs", lambda m: _flops(m.decoder_flops), _less(full, pruned, "decoder_flops"))
    row("with encoder", lambda m: _flops(m.flops), _less(full, pruned, "flops"))

    console = _console()
    console.print(Text.assemble((question, "bold"), (f"  ({model})", "dim")))
    console.print()
    console.print(table)
    console.print()
    for line in (
        f"{report.positions} positions; {report.score}; selected in "
        f"{1000 * report.seconds_selecting:.1f} ms",
        f"prefill: time to the first token, encoder included; {outcome.device}, {outcome.dtype}, "
        f"median of {outcome.repeat}",
        "KV cache and FLOPs: of the visual tokens",
    ):
        console.print(line, style="dim", markup=False)


def _less(full: Measured, pruned: Measured, name: str) -> str:
    before, after = getattr(full, name), getattr(pruned, name)
    return "" if before == after else f"-{100 * (1 - after / before):.0f} %"


def _flops(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}FLOPs"
    return f"{value / 1e6:.3g} MFLOPs"
