"""A training run from what the command line was given: checked first, then put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from vlmprune.errors import VlmpruneError, meant
from vlmprune.hosts.config import longest_prompt
from vlmprune.io import libraries
from vlmprune.io.models import Loaded
from vlmprune.io.options import one_of
from vlmprune.methods import METHODS
from vlmprune.methods.bases.learned import Learned
from vlmprune.study.tasks import Task
from vlmprune.training.data import Entry
from vlmprune.training.draws import held_out

EXTRA = "train"
STAGES = ("align", "tune")
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be trained.

    Attributes:
        method: its name.
        hyper: settings of a fresh module, by name.
        base: weights to go on from, instead of fresh ones; None for fresh ones. Beside settings,
            a fresh module takes over those of its weights that have the same name and shape.
        stage: "align" trains the module alone, "tune" a LoRA of the language model along.
        lora: rank of the LoRA; 0 for none.
        side: pixels a side that pictures are scaled to; None for what the processor does.
        cache: folder for the vision encoder's states; None to run it in every step.
        held_out: entries, from the last, on which the loss is only measured.
    """

    method: str
    hyper: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    stage: str = "tune"
    lora: int = 0
    side: int | None = None
    cache: Path | None = None
    held_out: int = 32


def check(wanted: Wanted) -> type[Learned]:
    """The method's class.

    Raises:
        VlmpruneError: a library is missing, the method cannot be trained, or options do not go
            together.
    """
    cls = METHODS.get(wanted.method)
    trainable = [name for name, one in METHODS.items() if _learns(one)]
    if cls is None or not _learns(cls):
        kind = "needs no training"
        if cls is None:
            kind = f"is unknown{meant(wanted.method, trainable)}"
        raise VlmpruneError(
            f"method {wanted.method!r} {kind}; methods that are trained: {', '.join(trainable)}."
        )
    for name in ("accelerate", "peft"):
        libraries.module(name, EXTRA)
    one_of("--stage", wanted.stage, STAGES)
    if wanted.stage == "align" and wanted.lora:
        raise VlmpruneError(
            f"--lora {wanted.lora} trains the language model, which --stage align leaves as it is; "
            "use --stage tune, or leave --lora out."
        )
    if wanted.lora < 0:
        raise VlmpruneError(f"--lora {wanted.lora} is no rank; use 1 or more, or 0 for none.")
    return cls


def _learns(cls: type[Any]) -> TypeGuard[type[Learned]]:
    return issubclass(cls, Learned)


def build(
    loaded: Loaded,
    cls: type[Learned],
    wanted: Wanted,
    entries: Sequence[Entry],
    task: Task | None,
    limit: int | None,
    settings: Any,
    out: Path,
    about: dict[str, Any],
    tell: Tell = lambda words, done, total: None,
    force: bool = False,
) -> Any:
    """A run that is ready to be trained.

    Args:
        loaded: model and processor.
        cls: the method's class.
        wanted: what is to be trained.
        entries: of the data.
        task: asked at intervals; None for none.
        limit: of its samples.
        settings: of the run, `trainer.Settings`.
        out: the run's folder.
        about: what else the run's file says of it.
        tell: told what goes on, and how much of how much is done.
        force: overwrite files of the run's and the states' names that are others'.

    Returns:
        A `trainer.Run`.

    Raises:
        VlmpruneError: the method does not work on the model, there are too few entries, or the
            encoder's states cannot be kept.
    """
    from vlmprune.io.processors import scale
    from vlmprune.training.learner import Learner
    from vlmprune.training.rows import RowMaker
    from vlmprune.training.states import States
    from vlmprune.training.trainer import Run

    model = loaded.model
    torch.manual_seed(settings.seed)
    pruner = _begun(cls, model, wanted)
    seen, kept = held_out(entries, wanted.held_out)
    if not seen:
        raise VlmpruneError(
            f"the data has {len(entries)} entries, of which --held-out {wanted.held_out} leaves "
            "none to train on; give more, or hold fewer out."
        )
    longest = longest_prompt(model.config)
    if wanted.side is not None:
        scale(loaded.processor, wanted.side)
    rows = RowMaker(loaded.processor, longest)
    states = None
    if wanted.cache is not None:
        mixed = settings.precision == "bfloat16"
        states = States(wanted.cache, model, pruner, rows, [*seen, *kept], mixed, force)
        states.fill(lambda done, total: tell("the vision encoder's states", done, total))
    peft = _peft(model, pruner, wanted.lora)
    names, tunes = _names(pruner, wanted.stage), wanted.stage == "tune"
    learner = Learner(model, pruner, names, states, peft, tunes, settings.weigh)
    title = _title(wanted)
    return Run(
        *(loaded, learner, rows, seen, kept, task, limit, settings, out, title, about, force)
    )


def _begun(cls: type[Learned], model: Any, wanted: Wanted) -> Learned:
    """The method as it is before the run's first step."""
    if wanted.base is None:
        return cls.fresh(model, **wanted.hyper)
    known = cls.from_pretrained(wanted.base)
    if not wanted.hyper:
        return known
    made = cls.fresh(model, **wanted.hyper)
    own, there = made.module.state_dict(), known.module.state_dict()
    fits = {k: v for k, v in there.items() if k in own and v.shape == own[k].shape}
    made.module.load_state_dict(own | fits)
    made.trained.lora = known.trained.lora
    return made


def _title(wanted: Wanted) -> str:
    """Of the curve."""
    parts = [wanted.method, *(f"{k}={v}" for k, v in wanted.hyper.items())]
    parts += [f"LoRA of rank {wanted.lora}"] if wanted.lora else []
    return ", ".join(parts)


def _names(pruner: Learned, stage: str) -> list[str] | None:
    """The module's parameters that a stage trains; None for all."""
    own = getattr(pruner, "trains", None)
    return None if own is None else list(own(stage))


def _peft(model: Any, pruner: Learned, rank: int) -> Any:
    """The model with PEFT's LoRA on all linear layers of its language model; None without one.

    A LoRA that the weights bring is put on as it is.

    Raises:
        VlmpruneError: another rank was asked for than that one has.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    known = pruner.trained.lora
    if known is not None:
        if rank not in (0, known.rank):
            raise VlmpruneError(
                f"--lora {rank} is not the rank of the LoRA that the weights bring, {known.rank}; "
                "leave it out."
            )
        pruner.module  # noqa: B018 - reads the LoRA's tensors, too
        rank, pruner.trained.lora = known.rank, None
    if not rank:
        return None
    decoder = model.get_decoder()
    names = {id(part): name for name, part in model.named_modules()}
    targets = [names[id(one)] for one in decoder.modules() if isinstance(one, nn.Linear)]
    alpha: Any = 2 * rank if known is None else known.alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():
        # PEFT asks for a name that Transformers is giving up.
        warnings.simplefilter("ignore", FutureWarning)
        made = get_peft_model(model, config)
    if known is not None:
        set_peft_model_state_dict(made, known.tensors)
    return made


def finish(run: Any, dtype: torch.dtype, notes: dict[str, Any]) -> None:
    """Give the model back without its LoRA, and write the weights into the run's folder.

    Raises:
        VlmpruneError: files that are no run's have come there, or the disk refuses.
    """
    from vlmprune.training.trainer import files

    learner = run.learner
    if learner.peft is not None:
        learner.pruner.take_lora(learner.peft)
        learner.peft.unload()
        # PEFT leaves it there, and would take the model for one that it has changed.
        vars(learner.host).pop("peft_config", None)
    # A method that leaves all tokens in has no count to be compared at.
    count = {"tokens": learner.tokens} if learner.tokens and learner.pruner.shortens else {}
    for one in files(run.out, run.force):
        one.check()
    learner.pruner.save_pretrained(run.out, dtype, {"training": notes} | count)
