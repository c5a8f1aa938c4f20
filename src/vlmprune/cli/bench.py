"""`vlmprune bench`: speed and memory with and without pruning."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vlmprune.cli.options import AsJson, Device, Dtype, Model
from vlmprune.cli.printing import console, print_json, progress
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from pathlib import Path

    from vlmprune.study.bench.results import Result

GPU, CPU = "measured on a GPU", "of a CPU: use the ratios only"
"""What the seconds in the JSON are."""


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
            "CPU), llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, …"
        ),
    ] = None,
    layers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="With --shape: only so many of the language model's layers."),
    ] = None,
    tower_layers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="With --shape: only so many of the vision tower's layers."),
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
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            help="With --shape: as many pictures as have this many visual tokens, or one of as "
            "many where the model takes any size; may be given several times."
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="With --shape: words of each prompt.")] = 64,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Prompts at once, 1 by default; may be given several times."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens that every call generates, end tokens ignored.")
    ] = 32,
    repeat: Annotated[int, typer.Option(help="Turns, of which the medians count.")] = 5,
    floor: Annotated[
        bool,
        typer.Option(
            help="Time the model with natively short prompts, too: as many visual tokens as are "
            "kept, nothing chosen, nothing attached."
        ),
    ] = True,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="On a CPU, measure peak memory (of tensors, by torch's profiler), too; it takes "
            "a slow call of each way.",
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Write all figures to a file, too."),
    ] = None,
    markdown: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.md", help="Write the figures as a table, too."),
    ] = None,
    plot: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.png", help="Draw them, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory with and without pruning, in turns.

    Every call generates the same number of tokens, whatever it says. Compare ratios: times depend
    on the machine and on what else it does, and on a CPU ratios alone are shown. Beside the
    methods stands the floor, the same model given a natively short prompt.
    """
    _check_together(shape, model, images, visual_tokens, layers or tower_layers)
    with progress("Starting…") as say:
        from vlmprune.cli.bench_tables import print_results
        from vlmprune.hosts.config import attention_implementation, of_text
        from vlmprune.io import models, sources
        from vlmprune.study import measure
        from vlmprune.study.bench import page as benchpage
        from vlmprune.study.bench import plot as benchplot
        from vlmprune.study.bench import run as benching
        from vlmprune.study.bench import workload

        with models.quiet():
            pruners = workload.parse_methods(method or [f"vispruner:keep={sources.KEEP}"])
            batches, wanted = batch or [1], visual_tokens or []
            for number in batches:
                sources.at_least_one(batch=number)
            sources.at_least_one(new_tokens=new_tokens, repeat=repeat, text_tokens=text_tokens)
            for number in wanted:
                sources.at_least_one(visual_tokens=number)
            pictures = workload.parse_images(images or ["1"])
            place = sources.choose_device(device)
            kind = sources.choose_dtype(dtype, place)
            target, page, drawing = (
                None if path is None else sources.result_path(path, option, ending)
                for path, option, ending in (
                    (out, "--out", ".json"),
                    (markdown, "--markdown", ".md"),
                    (plot, "--plot", ".png"),
                )
            )
            if shape is not None:
                works = workload.from_shape(
                    *(shape, pruners, place, kind, batches, pictures, wanted),
                    *(text_tokens, new_tokens, say, layers, tower_layers),
                )
            else:
                source = sources.find_model(model)
                for pruner in pruners.values():
                    sources.check_budget(source, pruner)
                say(f"Loading {source.label}…")
                works = workload.from_model(source, place, kind, batches, pictures)
            results: list[Result] = []
            command, arguments = _command(context)
            content: dict[str, Any] = {
                "command": command,
                "arguments": arguments,
                **measure.facts(place),
                "attention": "",
                "seconds_are": GPU if place.type == "cuda" else CPU,
                "runs": [],
            }
            for one in works:
                results.append(
                    benching.compare(one, pruners, new_tokens, repeat, say, floor, memory)
                )
                content["attention"] = attention_implementation(of_text(one.model.config))
                content["runs"].append(results[-1].as_dict())
                if target is not None:
                    # A run that is stopped keeps what it has.
                    _write(target, _json(content))
    if as_json:
        print_json(content)
    else:
        print_results(results, content)
    for path, what, made in (
        (target, "all figures are", lambda: _json(content)),
        (page, "the table is", lambda: benchpage.markdown(content).encode()),
        (drawing, "the plot is", lambda: benchplot.plot(content)),
    ):
        if path is not None:
            _write(path, made())
            if not as_json:
                console().print(f"{what} in {path}", markup=False, soft_wrap=True)


def _check_together(
    shape: str | None,
    model: str | None,
    images: list[str] | None,
    visual_tokens: list[int] | None,
    layers: int | None,
) -> None:
    """Refuse options that do not go together."""
    if shape is None:
        if layers is not None:
            raise VlmpruneError(
                "--layers and --tower-layers need a --shape; a model has what it has."
            )
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
            given.append(option if value else (one.secondary_opts or [option])[0])
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            given += [option, str(item)]
    return shlex.join(["vlmprune", "bench", *given]), dict(context.params)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write(target: Path, content: bytes) -> None:
    try:
        target.write_bytes(content)
    except OSError as error:
        raise VlmpruneError(f"{str(target)!r} cannot be written ({error.strerror}).") from error
