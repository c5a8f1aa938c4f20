"""`vlmprune compare`: methods and budgets over the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import (
    AsJson,
    Batch,
    Device,
    Dtype,
    Force,
    Limit,
    Model,
    Number,
    Question,
    Text,
    Texts,
)
from vlmprune.cli.printing import (
    bar,
    console,
    figures_table,
    notes,
    print_json,
    ruled_table,
    typed,
)
from vlmprune.errors import VlmpruneError
from vlmprune.files import path_of

if TYPE_CHECKING:
    from rich.table import Table

    from vlmprune.study.compare.results import Comparison

# What is compared where nobody says.
METHODS = "random,uniform,divprune,vispruner"
KEEPS = "0.5,0.25,0.11"
TASK = "scenes"
# Terminals of fewer columns show less.
NARROW = 96


def compare(
    context: typer.Context,
    pictures: Annotated[
        Texts,
        typer.Argument(
            metavar="PICTURE",
            help="Pictures of your own, each asked every --question; without any, a --task is "
            "asked.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        Texts,
        typer.Option(
            metavar="SPECS",
            help="Methods separated by commas, with settings where wanted, as in "
            f"random,vispruner:important_ratio=0.75,plphp; by default {METHODS}.",
        ),
    ] = None,
    keep: Annotated[
        Text,
        typer.Option(
            metavar="BUDGETS",
            help="Budgets separated by commas, for each method whose spec leaves it open: numbers "
            f"of visual tokens, or fractions; by default {KEEPS}.",
        ),
    ] = None,
    question: Question = None,
    task: Annotated[
        Text,
        typer.Option(
            help="scenes (the embedded model's held-out pictures, the default), clips (its "
            "held-out clips), folder:PATH with pictures and a questions.json, or a local copy of a "
            "standard set (see `eval`)."
        ),
    ] = None,
    limit: Limit = None,
    out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Where page, plot, figures and answers go; a comparison that was stopped goes on "
            "with the answers that are there.",
        ),
    ] = "compare",
    html: Annotated[
        Text, typer.Option(metavar="FILE.html", help="Where the page goes; by default into --out.")
    ] = None,
    show: Annotated[
        Number,
        typer.Option(
            help="Questions on the page, at most 12; by default 4 of a task, and the first 12 "
            "about pictures given."
        ),
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[
        Number, typer.Option(help="Longest answer about pictures given; by default 64.")
    ] = None,
    batch: Batch = 32,
    repeat: Annotated[int, typer.Option(help="Timed turns, of which the medians count.")] = 5,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods at several budgets: what is lost, what is saved, what is kept.

    Writes one page that needs no network, a plot, and all figures.
    """
    _check_together(pictures, question, task, limit, max_new_tokens)
    with bar() as tell:
        tell("Starting…", 0, 1)
        from vlmprune import spec
        from vlmprune.io import models, options, sources
        from vlmprune.io.outputs import Output, check_folder, claim, named
        from vlmprune.io.pictures import open_images
        from vlmprune.study import measure, tasks
        from vlmprune.study.compare import configurations
        from vlmprune.study.compare.page import render
        from vlmprune.study.compare.plot import axes_of, dots_of, plot
        from vlmprune.study.compare.results import MARK, MOST
        from vlmprune.study.compare.run import SHOWN, Pictures
        from vlmprune.study.compare.run import compare as compare_all

        with models.quiet():
            specs = [one for text in methods or [METHODS] for one in spec.listed(text)]
            found = configurations.ways_of(
                specs, configurations.keeps_of(keep or KEEPS), keep is not None
            )
            options.at_least_one(batch=batch, repeat=repeat, limit=limit)
            if show is not None and show < 0:
                raise VlmpruneError(f"--show {show} is below 0; use 0 for none.")
            if show is not None and show > MOST:
                raise VlmpruneError(
                    f"--show {show} is above the {MOST} questions that a page holds; use "
                    f"{MOST} or fewer."
                )
            asked: tasks.Task
            if pictures:
                longest = 64 if max_new_tokens is None else max_new_tokens
                options.at_least_one(max_new_tokens=longest)
                opened = open_images(pictures)
                asked = Pictures(tuple(pictures), tuple(opened), tuple(question or ()), longest)
            else:
                asked = tasks.find_task(task or TASK)
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            folder = path_of(out)
            files = {
                name: Output(folder / f"compare.{ending}", MARK, force)
                for name, ending in (("page", "html"), ("plot", "png"), ("figures", "json"))
            }
            if html is not None:
                files["page"] = Output(named(html, "--html", ".html", ".htm"), MARK, force)
            check_folder(folder)
            check_folder(folder / "answers")
            claim(files.values(), pictures or ())
            tell(f"Loading {source.label}…", 0, 1)
            loaded = models.load(source, place, kind)
            count = show if show is not None else None if pictures else SHOWN
            result = compare_all(
                *(loaded, source, found, asked, limit, batch, repeat, count),
                *(folder / "answers", tell),
            )
            tell("Drawing…", 1, 1)
            facts = measure.facts(place)
            command = typed(context)
            title = f"{result.model} on {result.task}"
            drawn = plot(dots_of(result), axes_of(result), result.what, title)
            content = {"made_by": MARK, "command": command, **facts, **result.as_dict()}
            files["plot"].write(drawn)
            files["figures"].write_json(content)
            files["page"].write(render(result, drawn, facts, command))
    targets = {name: file.path for name, file in files.items()}
    if as_json:
        print_json(content | {"files": {name: str(path) for name, path in targets.items()}})
    else:
        own = [Path(one).name for one in pictures or () for _ in question or ()]
        _print(result, facts, targets, folder / "answers", own)


def _check_together(
    pictures: list[str] | None,
    question: list[str] | None,
    task: str | None,
    limit: int | None,
    max_new_tokens: int | None,
) -> None:
    """Refuse options that do not go together."""
    if pictures:
        if task is not None:
            raise VlmpruneError("pictures and --task exclude each other; give one of them.")
        if limit is not None:
            raise VlmpruneError("--limit is for a --task; name fewer pictures or questions.")
        if not question or not all(one.strip() for one in question):
            raise VlmpruneError(
                'a question about the pictures is missing; give one, as in --question "What is '
                'this?"'
            )
        return
    for name, value in (("question", question), ("max-new-tokens", max_new_tokens)):
        if value:
            raise VlmpruneError(
                f"--{name} is for pictures of one's own, and none are given; name some, or leave "
                "it out."
            )


def _print(
    result: Comparison,
    facts: dict[str, Any],
    targets: dict[str, Path],
    answers: Path,
    own: list[str],
) -> None:
    from rich.text import Text

    from vlmprune.study.wording import counted

    out = console()
    questions = counted(result.questions, "question")
    out.print(Text.assemble((result.model, "bold"), f" on {result.task}, {questions}"))
    out.print()
    out.print(_table(result, out.width))
    out.print()
    # Of a task nothing is shown here.
    for name, shown in zip(own, result.shown, strict=False):
        out.print(_answers(result, name, shown.question, [one.text for one in shown.answers]))
        out.print()
    for one in result.skipped:
        out.print(f"left out: {one.spec}: {one.reason}", markup=False, soft_wrap=True)
    lines = [_scored(result)]
    if any(row.against is not None for row in result.rows):
        lines.append(
            "against random: points, question by question, ± half of the 95 % interval; wins or "
            "loses where that leaves out 0"
        )
    if any(row.kv_read is not None for row in result.rows):
        lines.append("visual KV: on the device, sketches included; read: by a decode step")
    lines += [
        "visual tokens: averaged over layers; LLM FLOPs, visual KV: of the visual tokens; all "
        "FLOPs: with the vision tower",
        f"first token: time to it, all tokens = 1; medians of {counted(result.repeat, 'turn')}",
        f"{facts['device_name']}; {result.device}, {facts['threads']} thread(s), {result.dtype}",
        f"page: {targets['page']}; plot: {targets['plot']}; figures: {targets['figures']}",
        f"answers are kept in {answers}: asked again, only what is missing is answered",
    ]
    notes(lines)


def _scored(result: Comparison) -> str:
    words = (
        "accuracy: share of right answers"
        if result.scored
        else "agreement: share of answers that are the unpruned model's; none is known to be true"
    )
    if result.rows[0].score.ends is None:
        return f"{words}; too few pictures for an interval"
    return f"{words}, with its 95 % interval, bootstrapped over pictures"


def _table(result: Comparison, width: int) -> Table:
    """All rows; a narrow terminal does without the FLOPs of the vision tower."""
    from rich.text import Text

    from vlmprune.study.compare.tables import columns, sections

    titles = columns(result)
    if width < NARROW:
        titles.pop("flops", None)
    least = min(18, max(len(row.name) for row in result.rows) + 2)
    table = figures_table("", titles.values(), least)
    for title, lines in sections(result):
        if title:
            table.add_row(Text(title, style="bold"))
        for line in lines:
            style = "dim" if line.row.control else "red" if line.row.verdict == "loses" else ""
            name = f"  {line.name}" if title else line.name
            table.add_row(Text(name), *(Text(line.texts[key]) for key in titles), style=style)
        table.add_section()
    return table


def _answers(result: Comparison, picture: str, question: str, texts: list[str]) -> Table:
    """What all configurations answered to one question about one picture."""
    from rich.text import Text

    from vlmprune.study.wording import budget

    table = ruled_table()
    for title in (Text(picture), Text(question), ""):
        table.add_column(title, overflow="fold")
    for row, text in zip(result.rows, texts, strict=True):
        name = row.name if row.keep is None else f"{row.name}, {budget(row.keep)}"
        same = "" if row.full else "same" if text == texts[0] else "differs"
        table.add_row(Text(name, style="dim"), Text(text), Text(same))
    return table
