"""How many tokens each method keeps again where what it sees is a little different.

    python benchmarks/kept_again.py               # what is missing
    python benchmarks/kept_again.py --only fastv  # one method's rows, anew

Every row of `accuracy.py` at one budget, and those without one, prefills one question about each
held-out scene, of one scene the first, of the next the second and so on. Where the method chooses,
it is asked twice: once of what it sees, and once of that with noise, each number x as
x · (1 + `NOISE` · n), n drawn from a normal distribution. Noised are all numbers that a choice is
made of: features, keys and states, attention and relevance. The model goes on with the first
answer, so that each choice is compared by itself, layer by layer where there are several. ToMe
and EViT, whose layers go on from what earlier ones left, run twice, with noise on the keys, or the
attention, of every layer.

`render.py` writes the columns "kept again" of docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

import accuracy
from accuracy import Row
from page_parts import RESULTS
from program import command
from vlmprune import embedded
from vlmprune.io.models import Loaded, quiet
from vlmprune.method import Method
from vlmprune.pruner import Pruner
from vlmprune.select import bipartite, leaving
from vlmprune.study import measure as measured
from vlmprune.study.evals.run import BATCH, evaluate
from vlmprune.study.tasks import Sample, Scenes
from vlmprune.views import Selection

FILE = RESULTS / "kept_again.json"
NOISE = 1e-3
BUDGET = 0.22
CHOICES = ("select", "drop", "retain", "retain_together")
"""A method's choices, each of which says what is kept."""


@dataclass(frozen=True)
class Prefills(Scenes):
    """One question about each held-out scene, of which one token is answered."""

    def samples(self, limit: int | None = None) -> list[Sample]:
        """Of one scene the first, of the next the second, and so on, so that all kinds occur."""
        scenes: dict[str, list[Sample]] = {}
        for one in super().samples():
            scenes.setdefault(one.group, []).append(one)
        asked = [own[number % len(own)] for number, own in enumerate(scenes.values())]
        return asked if limit is None else asked[:limit]

    def max_new_tokens(self, sample: Sample) -> int:
        """As many as prefill gives."""
        return 1


class Counts:
    """Tokens that were kept, and those of them that were kept again."""

    def __init__(self) -> None:
        self.kept = self.again = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Compare two choices, bools of one shape."""
        self.kept += int(first.sum())
        self.again += int((first & second).sum())


def noised(seen: Any, generator: torch.Generator) -> Any:
    """What a method sees with noise on every number, however nested; flags and places stay."""
    if isinstance(seen, Tensor):
        if not seen.is_floating_point():
            return seen
        noise = torch.randn(seen.shape, generator=generator).to(seen)
        return seen + NOISE * noise * seen
    if isinstance(seen, Mapping):
        return {name: noised(one, generator) for name, one in seen.items()}
    if is_dataclass(seen) and not isinstance(seen, type):
        made = {one.name: noised(getattr(seen, one.name), generator) for one in fields(seen)}
        return replace(seen, **made)
    return seen


@contextmanager
def asked_twice(cls: type[Method], counts: Counts, generator: torch.Generator) -> Iterator[None]:
    """Let each choice of a class's methods inside the block be made twice and compared."""

    def twice(plain: Callable[..., Any]) -> Callable[..., Any]:
        def choose(self: Method, *given: Any) -> Any:
            first = plain(self, *given)
            second = plain(self, *(noised(one, generator) for one in given))
            if first is not None:
                counts.add(first.kept, second.kept)
            return first

        return choose

    with ExitStack() as stack:
        for name in CHOICES:
            plain = getattr(cls, name)
            if plain is not getattr(Method, name):
                stack.enter_context(mock.patch.object(cls, name, twice(plain)))
        yield


@contextmanager
def layers_noised(acts: str, generator: torch.Generator) -> Iterator[None]:
    """Let layers of an encoder inside the block merge, or drop, by noised keys or attention."""
    module, name = {"merging": (bipartite, "match"), "dropping": (leaving, "highest")}[acts]
    plain = getattr(module, name)

    def decide(seen: Tensor, *given: Any) -> Tensor:
        found: Tensor = plain(noised(seen, generator), *given)
        return found

    with mock.patch.object(module, name, decide):
        yield


@contextmanager
def noting(cls: type[Method], kept: list[Tensor]) -> Iterator[None]:
    """Note what a class's methods keep inside the block."""
    plain = cls.select

    def select(self: Method, view: Any) -> Selection:
        found = plain(self, view)
        kept.append(found.kept)
        return found

    with mock.patch.object(cls, "select", select):
        yield


def counted(loaded: Loaded, pruner: Pruner, batch: int, limit: int | None, seed: int) -> Counts:
    """What a pruner keeps again on the first scenes, all by default."""
    counts, generator = Counts(), torch.Generator().manual_seed(seed)

    def run() -> None:
        evaluate(loaded, pruner, Prefills(), limit=limit, batch=batch)

    cls = type(pruner)
    if pruner.acts in ("merging", "dropping"):
        first, second = list[Tensor](), list[Tensor]()
        with noting(cls, first):
            run()
        with noting(cls, second), layers_noised(pruner.acts, generator):
            run()
        for pair in zip(first, second, strict=True):
            counts.add(*pair)
        return counts
    with asked_twice(cls, counts, generator):
        run()
    return counts


def planned() -> list[Row]:
    """The rows of `accuracy.py` at the budget, and those without one."""
    return [one for one in accuracy.planned([]) if one.budget in (BUDGET, None)]


def measure(
    path: Path, rows: list[Row], batch: int, again: bool = False, limit: int | None = None
) -> None:
    """Make what is missing or was made with other settings, and write the file after each row."""
    found = accuracy.read(path)
    known = {(row["label"], row["budget"]): row for row in found["rows"]}
    with quiet():
        loaded = Loaded(*embedded.load())
    found |= {"noise": NOISE, "budget": BUDGET, "scenes asked": len(Prefills().samples(limit))}
    for row in rows:
        if not again and not accuracy.stale(row, known.get(row.key)):
            continue
        counts = [
            counted(loaded, pruner, batch, limit, seed) for seed, pruner in enumerate(row.pruners)
        ]
        known[row.key] = {
            "label": row.label,
            "budget": row.budget,
            **accuracy.facts(row),
            "kept": sum(one.kept for one in counts),
            "again": sum(one.again for one in counts),
            "versions": measured.versions(),
        }
        found["rows"] = list(known.values())
        accuracy.write(path, found)
        print(f"{row}: {shares(found)[row.key]:.1%} kept again", flush=True)
    accuracy.write(path, found)


def shares(found: Mapping[str, Any]) -> dict[tuple[str, float | None], float]:
    """The share kept again, by label and budget."""
    rows = found["rows"]
    return {(row["label"], row["budget"]): row["again"] / row["kept"] for row in rows}


def setup(found: Mapping[str, Any]) -> str:
    """What was measured with what."""
    versions = [
        " and ".join(sorted({row["versions"][library] for row in found["rows"]}))
        for library in ("torch", "transformers")
    ]
    return (
        f"Noise of {found['noise']:g}, at a budget of {found['budget']:.0%}, one question about "
        f"each of {found['scenes asked']} scenes; float32, torch {versions[0]}, transformers "
        f"{versions[1]}."
    )


def main(
    only: Annotated[str, typer.Option(help="Names of methods, parted by commas; anew.")] = "",
    batch: Annotated[int, typer.Option(help="Questions prefilled at once.")] = BATCH,
    results: Annotated[Path, typer.Option(help="JSON file, read and written.")] = FILE,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(1)
    names = [name.strip() for name in only.split(",") if name.strip()]
    rows = [one for one in planned() if not names or one.method in names]
    measure(results, rows, batch, again=bool(names))


if __name__ == "__main__":
    command(main)()
