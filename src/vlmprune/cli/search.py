"""`vlmprune search`: the cheapest setting of a method that stays within a given loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vlmprune.cli.options import AsJson, Batch, Device, Dtype, Force, Model, Number, Text, Texts
from vlmprune.cli.printing import console, figures_table, notes, print_json, progress
from vlmprune.costs.units import percent

if TYPE_CHECKING:
    from rich.table import Table

    from vlmprune.study.search.run import Asked, Outcome

# Rows of the table of trials.
SHOWN = 8


def search(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="What to search: gsearch for a schedule of rates, or any method, with the "
            "settings that are to stay, as in vispruner:budget=image.",
        ),
    ],
    max_loss: Annotated[
        str, typer.Option(help="The most that may be lost, as a share of the unpruned accuracy.")
    ] = "1%",
    over: Annotated[
        Texts,
        typer.Option(
            help="What to vary: keep=0.05..0.5, or keep=16,32,64; may be given several times. "
            "By default keep, important_ratio and their like."
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="scenes, clips, folder:PATH with pictures and a questions.json, or a local copy "
            "of a standard set (see `eval`)."
        ),
    ] = "scenes",
    limit: Annotated[
        Number, typer.Option(help="Questions of each half of the task; by default all.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Settings to try.")] = 40,
    cost: Annotated[
        Text,
        typer.Option(
            help="What to save: flops (of prefill, the default), kv (visual KV), tokens (visual "
            "tokens), or read (bytes that a decode step reads, the default of recall)."
        ),
    ] = None,
    group: Annotated[int, typer.Option(help="gsearch: decoder layers that share a rate.")] = 1,
    out: Annotated[
        str, typer.Option(metavar="FILE.json", help="The outcome; a plot and a journal beside it.")
    ] = "search.json",
    restart: Annotated[
        bool, typer.Option(help="Forget the trials of an earlier search into this file.")
    ] = False,
    model: Model = None,
    batch: Batch = 32,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find the cheapest setting of a method, or the cheapest schedule, within a given loss.

    A search that was stopped goes on where it was when it is asked for again.
    """
    with progress("Starting…") as say:
        from vlmprune.io import libraries, models, options, sources
        from vlmprune.io.outputs import Output, claim, file_of
        from vlmprune.study import tasks
        from vlmprune.study.search import spaces
        from vlmprune.study.search.optimise import MARK, Journal
        from vlmprune.study.search.plot import plot
        from vlmprune.study.search.run import COSTS, ask, run

        with models.quiet():
            libraries.module("optuna", "search")
            options.at_least_one(batch=batch, limit=limit)
            target = file_of(out, "--out")
            asked = ask(
                method,
                over or [],
                cost,
                spaces.share(max_loss),
                trials,
                group,
                limit,
                batch,
                target,
            )
            result, drawing = (Output(path, MARK, force) for path in (asked.out, asked.picture))
            journal = Journal(asked.journal, MARK, force)
            claim([result, drawing, journal])
            chosen = tasks.find_task(task)
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            say(f"Loading {source.label}…")
            loaded = models.load(source, place, kind)
            # What is no journal is here by --force alone.
            if restart or journal.foreign():
                asked.journal.unlink(missing_ok=True)
            outcome = run(loaded, asked, chosen, say)
            content = {"made_by": MARK, **outcome.content}
            result.write_json(content)
            drawing.write(plot(outcome.found, COSTS[asked.cost][1], f"{asked.stage.name}, {task}"))
    if as_json:
        print_json(content | {"file": str(asked.out), "plot": str(asked.picture)})
    else:
        _print(outcome, asked)
    if outcome.found.best is None:
        raise typer.Exit(1)


def _print(outcome: Outcome, asked: Asked) -> None:
    from vlmprune.study.wording import in_points

    show = console()
    show.print(_table(outcome))
    show.print()
    found, difference = outcome.found, outcome.difference
    lines = []
    if found.best is None:
        nearest = found.nearest
        least = "none was measured"
        if nearest is not None:
            least = f"the least lost {percent(nearest.loss, '.1f')}"
        lines.append(
            f"no setting tried stays within a loss of {percent(found.max_loss, '.1f')} ({least}); "
            "allow more by --max-loss, or give more --trials"
        )
    else:
        lines.append(f"--method {outcome.method}")
    if difference is not None and outcome.checked is not None and outcome.full is not None:
        lines.append(
            f"on {difference.count} questions about other pictures: "
            f"{percent(outcome.checked.accuracy or 0, '.1f')} against "
            f"{percent(outcome.full.accuracy or 0, '.1f')} without pruning, a difference in points "
            f"of {in_points(difference)}"
            f"{'' if difference.ends else '; too few pictures for an interval'}"
        )
    lines.append(f"kept in {asked.out}, drawn in {asked.picture}, trials in {asked.journal}")
    notes(lines)


def _table(outcome: Outcome) -> Table:
    table = figures_table("settings", ("accuracy", "loss", "cost"))
    found = outcome.found
    table.add_row("no pruning", percent(found.full, ".1f"), "", percent(1), style="dim")
    for one in found.front[-SHOWN:][::-1]:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in one.settings.items())
        table.add_row(
            settings,
            *(percent(value, ".1f") for value in (one.accuracy, one.loss, one.cost)),
            style="bold" if one == found.best else "",
        )
    return table


def _short(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_short(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
