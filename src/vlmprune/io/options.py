"""What options say, checked before anything is loaded: methods, counts, device, dtype."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from vlmprune import spec
from vlmprune.errors import VlmpruneError, meant
from vlmprune.pruner import Pruner
from vlmprune.select.budget import Budget

DTYPES = ("float32", "float16", "bfloat16")

# Visual tokens to keep where nobody says how many.
KEEP = 64


def make_pruner(method: str, settings: Mapping[str, Any]) -> Pruner:
    """The methods of a spec, its gaps filled by the command line's options.

    An option sets that setting of every method that has it and that the spec leaves open. Without
    one, a method that needs `keep` gets the default.

    Args:
        method: a spec, see `vlmprune.spec`.
        settings: values of the options by their settings' names; None where one was not given.

    Raises:
        VlmpruneError: the method, a setting of it or a value is unknown; or an option changes
            nothing.
    """
    stages = spec.read(method)
    for name, value in settings.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        taken = spec.fill(stages, name, value)
        if taken is None:
            raise VlmpruneError(
                f"{option} is no setting of {', '.join(stage.name for stage in stages)}; leave it "
                "out."
            )
        if not taken:
            raise VlmpruneError(
                f"{name} is given twice, in --method {method} and by {option}; give it once."
            )
    for stage in stages:
        if "keep" in stage.missing:
            stage.settings["keep"] = KEEP
    return spec.build(stages)


def budget_of(pruner: Pruner) -> tuple[int | float | None, Budget]:
    """`keep` and `budget` of the method that sees all visual tokens; keep is None without one."""
    # Of several methods that choose, that is the first.
    stage: Any = next((one for one in pruner.links if "keep" in dir(one)), None)
    return (None, "crop") if stage is None else (stage.keep, stage.unit)


def one_of(what: str, value: str, choices: Collection[str]) -> str:
    """A value that is one of some.

    Args:
        what: the value is, for the error sentence.
        value: as it was given.
        choices: what it may be.

    Raises:
        VlmpruneError: it is none of them.
    """
    if value not in choices:
        known = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise VlmpruneError(f"{what} {value!r} is unknown{meant(value, choices)}; use {known}.")
    return value


def at_least_one(**counts: int | None) -> None:
    """Refuse options that are below 1; None is one that was not given.

    Raises:
        VlmpruneError: one of them is.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise VlmpruneError(f"--{name.replace('_', '-')} {value} is too few; use 1 or more.")


def check_decode(tokens: int) -> None:
    """Refuse a number of tokens that leaves no step to measure; 0 measures none.

    Raises:
        VlmpruneError: it does.
    """
    if tokens < 0 or tokens == 1:
        raise VlmpruneError(
            f"--decode-tokens {tokens} leaves no step after the first token; use 2 or more, or 0 "
            "to skip it."
        )


def check_pictures(stages: Sequence[spec.Stage]) -> None:
    """Refuse methods that work on videos alone, where there are pictures.

    They would pass pictures whole, and seem to lose nothing.

    Raises:
        VlmpruneError: one of them does.
    """
    for stage in stages:
        if stage.for_videos:
            raise VlmpruneError(
                f"{stage.name} needs videos, and these are pictures; choose another --method."
            )


def choose_device(name: str | None) -> torch.device:
    """The device asked for; by default the GPU where there is one.

    Raises:
        VlmpruneError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # An absent backend fails as RuntimeError, AssertionError, NotImplementedError or ImportError.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise VlmpruneError(f"device {name!r} is not available here; use --device cpu.") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> Any:
    """The type of the weights; by default float32 on a CPU, else what the checkpoint says.

    Raises:
        VlmpruneError: the type is unknown.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, one_of("dtype", name, DTYPES))
