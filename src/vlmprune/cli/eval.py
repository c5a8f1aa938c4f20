"""`vlmprune eval`: a method on a task, beside the unpruned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmprune.cli.options import (
    AsJson,
    Batch,
    Budget,
    Device,
    Dtype,
    Force,
    Keep,
    Limit,
    Markdown,
    Model,
    Newlines,
    Text,
    keep_of,
)
from vlmprune.cli.printing import bar, console, notes, print_json, ruled_table, typed
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from rich.table import Table

    from vlmprune.study.evals.tables import Assessed

# Where answers are kept where nobody says.
FOLDER = "vlmprune-eval"


def evaluate(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="A method with its settings, as vispruner:keep=64; chain several by +.",
        ),
    ] = "vispruner",
    keep: Keep = None,
    budget: Budget = None,
    newlines: Newlines = None,
    task: Annotated[
        str,
        typer.Option(
            help="scenes (the embedded model's held-out pictures), clips (its held-out clips), "
            "folder:PATH with pictures and a questions.json, or a local copy of a standard set: "
            "pope:PATH, gqa:PATH, textvqa:PATH, scienceqa:PATH, mme:PATH, vqav2:PATH."
        ),
    ] = "scenes",
    limit: Limit = None,
    model: Model = None,
    batch: Batch = 32,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="Do not ask the unpruned model.")
    ] = False,
    out: Annotated[
        Text,
        typer.Option(
            metavar="FILE.jsonl",
            help="Where answers go, one a line as they are given; a run that was stopped goes on "
            f"with them. By default a file below {FOLDER}.",
        ),
    ] = None,
    markdown: Markdown = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a method costs in accuracy and saves in work, on a set of questions.

    A run that was stopped goes on where it was when it is asked for again.
    """
    with bar() as tell:
        tell("Starting…", 0, 1)
        from vlmprune import spec
        from vlmprune.io import models, options, sources
        from vlmprune.io.outputs import Output, check_folder, claim, named
        from vlmprune.study import tasks
        from vlmprune.study.evals import kept_answers
        from vlmprune.study.evals.results import FORMAT, UNPRUNED
        from vlmprune.study.evals.run import empty
        from vlmprune.study.evals.run import evaluate as answer
        from vlmprune.study.evals.store import Store, StoreFile
        from vlmprune.study.evals.tables import MARK, Assessed

        with models.quiet():
            settings = {
                "keep": None if keep is None else keep_of(keep),
                "budget": budget,
                "newlines": newlines,
            }
            stages = spec.read(method)
            pruner = options.make_pruner(method, settings)
            options.check_pictures(stages)
            options.at_least_one(batch=batch, limit=limit)
            chosen = tasks.find_task(task)
            samples = chosen.samples(limit)
            if no_baseline and not any(one.answers for one in samples):
                raise VlmpruneError(
                    f"{chosen.label} has no true answers, so that all to tell is how often the "
                    "unpruned model's are given; leave out --no-baseline."
                )
            table = None
            if markdown is not None:
                table = Output(named(markdown, "--markdown", ".md"), MARK, force)
            stores: list[StoreFile] = []
            if out is not None:
                target = named(out, "--out", ".jsonl")
                both = target, target.with_suffix(f".{UNPRUNED}{target.suffix}")
                stores = [StoreFile(one, FORMAT, force) for one in both]
            ways = 1 if no_baseline else 2
            check_folder(Path(FOLDER) if out is None else target.parent)
            claim([table, *stores[:ways]])
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            tell(f"Loading {source.label}…", 0, 1)
            loaded = models.load(source, place, kind)
            if not stores:
                marked = kept_answers.digest(loaded, source, chosen)
                folder = Path(FOLDER) / f"{kept_answers.plain(chosen.label)[-40:]}-{marked}"
                names = "+".join(stage.name for stage in stages)
                two = (names, pruner), (UNPRUNED, None)
                stores = [
                    StoreFile(folder / kept_answers.file_name(*one), FORMAT, force) for one in two
                ]
            for store, way in list(zip(stores, (pruner, None), strict=True))[:ways]:
                # What is no store at all is here by --force alone.
                if store.foreign():
                    store.check()
                    store.path.unlink()
                Store(store.path, empty(loaded, way, chosen), way).check()
            found = []
            # The unpruned model first: it also tells soonest whether the set can be answered.
            for turn, number in enumerate([0] if no_baseline else [1, 0]):
                way = (pruner, None)[number]
                title = (spec.dump(pruner), UNPRUNED)[number]

                def say(done: int, total: int, title: str = title, turn: int = turn) -> None:
                    words = f"{title}: question {done} of {total}"
                    tell(words, turn * total + done, ways * total)

                found.append(
                    answer(loaded, way, chosen, limit, batch, say, str(stores[number].path))
                )
            answers, full = found[-1], None if no_baseline else found[0]
            result = Assessed(
                label=source.label,
                spec=spec.dump(pruner),
                answers=answers,
                full=full,
                figures=chosen.summary(answers.results),
                full_figures={} if full is None else chosen.summary(full.results),
            )
            if table is not None:
                table.write(result.markdown(typed(context)))
    kept = {"answers": str(stores[0].path)}
    if not no_baseline:
        kept["unpruned"] = str(stores[1].path)
    if table is not None:
        kept["markdown"] = str(table.path)
    if as_json:
        print_json(result.as_dict() | {"files": kept})
    else:
        _print(result, kept)


def _print(result: Assessed, kept: dict[str, str]) -> None:
    from rich.text import Text

    out = console()
    out.print(Text.assemble((result.label, "bold"), f" on {result.asked}"), soft_wrap=True)
    out.print()
    table = _table(result, " (")
    # Without room of its own, a table measures what fits.
    room = out.options.update(max_width=1000)
    if out.measure(table, options=room).maximum > out.width:
        # Intervals below their values.
        table = _table(result, "\n(")
    out.print(table)
    out.print()
    lines = [*result.notes(), "answers are kept in " + " and ".join(_stores(kept))]
    if "markdown" in kept:
        lines.append(f"table: {kept['markdown']}")
    notes(lines)


def _table(result: Assessed, bracket: str) -> Table:
    """The table, with what is to stand before an interval."""
    from rich.text import Text

    from vlmprune.study.wording import ALL_TOKENS

    table = ruled_table()
    table.add_column("", style="dim", no_wrap=True)
    table.add_column(ALL_TOKENS, justify="right")
    table.add_column(Text(result.spec), justify="right", style="bold", overflow="fold")
    table.add_column("difference", justify="right")
    for name, *cells in result.lines():
        table.add_row(Text(name), *(Text(cell.replace(" (", bracket)) for cell in cells))
    return table


def _stores(kept: dict[str, str]) -> list[str]:
    return [path for name, path in kept.items() if name != "markdown"]
