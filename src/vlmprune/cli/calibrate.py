"""`vlmprune calibrate`: PLPHP's thresholds for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import AsJson, Batch, Device, Dtype, Force, Model, Question, Text, Texts
from vlmprune.cli.printing import console, notes, print_json, progress, ruled_table
from vlmprune.costs.units import percent
from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file, is_folder, path_of

if TYPE_CHECKING:
    from rich.table import Table

# Asked where no question is given.
QUESTIONS = ("What is in the picture?", "Describe the picture.")


def calibrate(
    images: Annotated[
        Texts,
        typer.Argument(
            metavar="IMAGE|FOLDER",
            help="Pictures, or folders of them, like those that the model will see; the embedded "
            "model has some of its own.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FILE.json", help="The file that `PLPHP.from_file` reads.")
    ] = "plphp.json",
    question: Question = None,
    model: Model = None,
    window: Annotated[
        int, typer.Option(help="How many of the prompt's last tokens are asked.")
    ] = 1,
    beta_quantile: Annotated[
        float, typer.Option(help="Share of layers that is to lie below beta.")
    ] = 0.25,
    alpha_quantile: Annotated[
        float, typer.Option(help="Share of layers that is to lie below alpha.")
    ] = 0.75,
    plot: Annotated[
        Text, typer.Option(metavar="FILE.png", help="Where to draw it; by default beside --out.")
    ] = None,
    batch: Batch = 4,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find PLPHP's thresholds for a model: its vision attention over your pictures."""
    with progress("Starting…") as say:
        from vlmprune.io import models, options, outputs, sources
        from vlmprune.io.pictures import open_image
        from vlmprune.methods import PLPHP
        from vlmprune.study.calibrate.plot import drawn
        from vlmprune.study.calibrate.results import MARK, document
        from vlmprune.study.calibrate.run import (
            check_quantiles,
            measure,
            questions_for,
            thresholds,
        )

        with models.quiet():
            probe = PLPHP(window=window)
            options.at_least_one(batch=batch)
            check_quantiles(beta_quantile, alpha_quantile)
            target = outputs.file_of(out, "--out")
            picture = target.with_suffix(".png") if plot is None else path_of(plot)
            result, drawing = (outputs.Output(path, MARK, force) for path in (target, picture))
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            files = _files(images or [], model)
            outputs.claim([result, drawing], files)
            say(f"Loading {source.label}…")
            loaded = models.load(source, place, kind)
            asked = question or _questions(model)
            opened = map(open_image, files)
            total = len(files) * len(asked)
            gammas = measure(
                loaded.model,
                questions_for(loaded, opened, asked, batch),
                window,
                lambda seen: say(f"{seen}, of {total}"),
            )
            alpha, beta = thresholds(gammas, beta_quantile, alpha_quantile)
            content = document(gammas, alpha, beta, source.label, beta_quantile, alpha_quantile)
            result.write_json(content)
            pruner = PLPHP(alpha=alpha, beta=beta, window=probe.window)
            drawing.write(drawn(gammas, pruner, source.label))
    if as_json:
        print_json(content | {"file": str(target), "plot": str(picture)})
        return
    show = console()
    show.print(_table(content, gammas.retention(pruner).mean(dim=0).tolist()))
    show.print()
    spec = f"plphp:from={target}"
    notes(
        (
            f"alpha {alpha:g}, beta {beta:g}: from {len(files)} picture(s), {len(asked)} "
            "question(s) each; for this model only",
            f"kept in {target}, drawn in {picture}; use it as --method {spec}",
        )
    )


def _files(given: list[str], model: str | None) -> list[str]:
    """The pictures named, folders opened up.

    Raises:
        VlmpruneError: none are given and the model has none, or a folder has none.
    """
    from vlmprune.io.pictures import SUFFIXES

    if not given:
        if model is not None:
            raise VlmpruneError(
                "no pictures are given; name some that are like those that the model will see."
            )
        from vlmprune import embedded

        given = [str(embedded.scenes())]
    files: list[str] = []
    for name in given:
        folder = Path(name)
        if not is_folder(folder):
            files.append(name)
            continue
        found = sorted(str(f) for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        if not found:
            raise VlmpruneError(f"folder {name!r} holds no pictures; give one that does.")
        files += found
    missing = [file for file in files if not is_file(file)]
    if missing:
        raise VlmpruneError(
            f"image {missing[0]!r} does not exist; give the path of a picture or of a folder."
        )
    return files


def _questions(model: str | None) -> list[str]:
    """What to ask where nothing is asked: the embedded model has few words, and its own."""
    if model is not None:
        return list(QUESTIONS)
    import json

    from vlmprune import embedded

    scenes = json.loads((embedded.scenes() / "scenes.json").read_text(encoding="utf-8"))
    asked = [pair["question"] for scene in scenes for pair in scene["questions"]]
    return sorted(set(asked))


def _table(content: dict[str, Any], retention: list[float]) -> Table:
    table = ruled_table()
    for name in ("layer", "vision attention", "lowest", "highest", "keeps"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer, kept in zip(content["layers"], retention, strict=True):
        figures = (f"{layer[name]:.3f}" for name in ("mean", "min", "max"))
        table.add_row(str(layer["layer"]), *figures, percent(kept))
    return table
