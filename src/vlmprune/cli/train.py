"""`vlmprune train`: the methods that learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import AsJson, Device, Dtype, Force, Limit, Model, Number, Text, Texts
from vlmprune.cli.printing import bar, console, print_json, typed
from vlmprune.costs.units import percent
from vlmprune.errors import VlmpruneError
from vlmprune.files import path_of

if TYPE_CHECKING:
    from collections.abc import Sequence

PRECISIONS = ("float32", "bfloat16")
WEIGHED = ("token", "answer")


def train(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="quecc, vistog or mod.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.json",
            help="Conversations about pictures, in LLaVA's form.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="The run's folder, and the weights' in the end.", show_default=False
        ),
    ],
    model: Model = None,
    images: Annotated[
        Text, typer.Option(metavar="DIR", help="Where pictures lie; by default beside --data.")
    ] = None,
    window: Annotated[
        Number, typer.Option(help="QueCC: side of the windows that become one token; 4 by default.")
    ] = None,
    tokens: Annotated[Number, typer.Option(help="VisToG: semantic tokens; 64 by default.")] = None,
    setting: Annotated[
        Texts,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another setting of the method; may come often."
        ),
    ] = None,
    base: Annotated[
        Text,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Weights to go on from; with other settings, those of them that fit.",
        ),
    ] = None,
    stage: Annotated[
        str,
        typer.Option(
            help="align: the method alone, the language model frozen; tune: all that the method "
            "trains, and a LoRA where --lora asks for one."
        ),
    ] = "tune",
    lora: Annotated[int, typer.Option(help="Rank of a LoRA of the language model.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Entries a step, on each process.")] = 8,
    turns: Annotated[
        int, typer.Option(help="Turns of an entry a step, drawn anew each time; 0 for all.")
    ] = 1,
    weigh: Annotated[
        str, typer.Option(help="What counts alike in the loss: each token, or each answer.")
    ] = "token",
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    lora_rate: Annotated[float, typer.Option(help="The LoRA's.")] = 2e-4,
    warm_up: Annotated[int, typer.Option(help="Steps up to the peak.")] = 50,
    precision: Annotated[
        str, typer.Option(help="Of the arithmetic: float32, or bfloat16 (mixed).")
    ] = "float32",
    cache: Annotated[
        Text,
        typer.Option(
            metavar="DIR",
            help="Keep the frozen vision encoder's states there, and run it once a picture.",
        ),
    ] = None,
    side: Annotated[
        Number,
        typer.Option(help="Pixels a side that pictures are scaled to; the processor's by default."),
    ] = None,
    held_out: Annotated[
        int, typer.Option(help="Entries, from the last, on which the loss is only measured.")
    ] = 32,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    task: Annotated[
        Text,
        typer.Option(help="A task, as `vlmprune eval` has it, that is asked at evaluations too."),
    ] = None,
    limit: Limit = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last checkpoint in --out.")
    ] = False,
    store: Annotated[str, typer.Option(help="Type of the weights in the file.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights and draws.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a method that learns, on a model that stays as it is.

    Only answers carry loss. A run that was killed goes on by --resume, and comes to the same.
    """
    with bar() as tell:
        tell("Starting…", 0, 1)
        import torch

        from vlmprune.io import models, options, sources
        from vlmprune.study import tasks
        from vlmprune.training import data as reading
        from vlmprune.training import start

        options.one_of("--precision", precision, PRECISIONS)
        options.one_of("--weigh", weigh, WEIGHED)
        options.one_of("--store", store, options.DTYPES)
        options.at_least_one(
            steps=steps, batch=batch, eval_every=eval_every, save_every=save_every, side=side
        )
        for name, number in (("turns", turns), ("held-out", held_out), ("warm-up", warm_up)):
            if number < 0:
                raise VlmpruneError(f"--{name} {number} is below 0; use 0 or more.")
        for name, value in (("rate", rate), ("lora-rate", lora_rate)):
            if value <= 0:
                raise VlmpruneError(f"--{name} {value:g} trains nothing; use a number above 0.")
        hyper = _hyper(window, tokens, setting or [])
        wanted = start.Wanted(
            method,
            hyper,
            base,
            stage,
            lora,
            side,
            None if cache is None else path_of(cache),
            held_out,
        )
        cls = start.check(wanted)
        with models.quiet():
            from vlmprune.io.outputs import claim
            from vlmprune.training.states import check_cache
            from vlmprune.training.trainer import TrainingSettings, files

            entries = reading.read(data, images)
            chosen = None if task is None else tasks.find_task(task)
            place = options.choose_device(device)
            kind = options.choose_dtype(dtype, place)
            source = sources.find_model(model)
            folder = path_of(out)
            own = [] if source.folder is None else source.folder.iterdir()
            index = None if wanted.cache is None else check_cache(wanted.cache, force)
            claim([*files(folder, force), index], [data, *own])
            tell(f"Loading {source.label}…", 0, 1)
            loaded = models.load(source, place, kind)
            settings = TrainingSettings(
                steps,
                batch,
                turns,
                rate,
                lora_rate,
                warm_up,
                seed,
                precision,
                eval_every,
                save_every,
                weigh,
            )
            about = {
                "method": method,
                "hyper": hyper,
                "from": base,
                "stage": stage,
                "lora": lora,
                "model": source.label,
                "data": data,
                "side": side,
                "held_out": held_out,
            }
            run = start.build(
                loaded, cls, wanted, entries, chosen, limit, settings, folder, about, tell, force
            )
            with models.enough_memory(place):
                state = run.train(resume, tell)
            # The LoRA leaves the model in the end.
            trained = run.learner.trained() | run.learner.lora()
            amount = sum(one.numel() for one in trained.values())
            notes = about | {"command": typed(context), "steps": state.global_step}
            start.finish(run, getattr(torch, store), notes)
    content = _content(run, state, folder, amount)
    if as_json:
        print_json(content)
        return
    for line in _lines(method, content):
        console().print(line, markup=False, soft_wrap=True)


def _hyper(window: int | None, tokens: int | None, given: Sequence[str]) -> dict[str, Any]:
    """The method's settings, from their own options and from --set.

    Raises:
        VlmpruneError: one is malformed or given twice.
    """
    from vlmprune import spec

    found: dict[str, Any] = {}
    named: list[tuple[str, Any]] = [("window", window), ("tokens", tokens)]
    for text in given:
        pair = spec.pair(text)
        if pair is None:
            raise VlmpruneError(f"--set {text!r} is not NAME=VALUE; write it as heads=8.")
        named.append((pair[0], spec.value_of(pair[1])))
    for name, value in named:
        if value is None:
            continue
        if name in found:
            raise VlmpruneError(f"{name} is given twice; give it once.")
        found[name] = value
    return found


def _content(run: Any, state: Any, folder: Path, amount: int) -> dict[str, Any]:
    """What came of it."""
    from vlmprune.training import curve

    points = curve.points(state.log_history)
    last = {k: v for one in points for k, v in one.items()}
    return {
        "folder": str(folder),
        "weights": f"{run.learner.pruner.method}:weights={folder}",
        "steps": state.global_step,
        "parameters": amount,
        "entries": len(run.entries),
        "curve": str(folder / "curve.png"),
        **{name: last[name] for name in ("loss", "held_out_loss", "accuracy") if name in last},
    }


def _lines(method: str, content: dict[str, Any]) -> list[str]:
    """The same in words."""
    figures = [f"loss {content['loss']:.3f}"] if "loss" in content else []
    if "held_out_loss" in content:
        figures.append(f"on what was held out {content['held_out_loss']:.3f}")
    if "accuracy" in content:
        figures.append(f"accuracy {percent(content['accuracy'], '.1f')}")
    return [
        f"{method}: {content['steps']} steps on {content['entries']} entries, "
        f"{content['parameters']:,} parameters; {', '.join(figures)}",
        f"drawn in {content['curve']}; use it as --method {content['weights']}",
    ]
