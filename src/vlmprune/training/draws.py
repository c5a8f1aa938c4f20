"""Which entry and which of its turns a training step sees: a function of the seed and its number.

Nothing else counts, neither how often a run was stopped nor on how many processes it runs, so that
a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from vlmprune.training.data import Entry


@dataclass(frozen=True)
class Drawn:
    """An entry with the turns of it that are asked."""

    entry: Entry
    turns: tuple[int, ...]


class Draws(Dataset[Drawn]):
    """The draws of a whole run, in the order in which it sees them.

    Each pass over the entries has an order of its own.

    Args:
        entries: what there is.
        length: draws of the run.
        turns: of each entry at most, drawn anew each time it comes up; 0 for all.
        seed: of the draws.
    """

    def __init__(self, entries: Sequence[Entry], length: int, turns: int, seed: int) -> None:
        self.entries, self.length, self.turns, self.seed = entries, length, turns, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Drawn:
        if not 0 <= number < self.length:
            raise IndexError(number)
        epoch, place = divmod(number, len(self.entries))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._order = epoch, rng.permutation(len(self.entries))
        entry = self.entries[int(self._order[1][place])]
        return Drawn(entry, self._drawn(entry, number))

    def _drawn(self, entry: Entry, number: int) -> tuple[int, ...]:
        """Numbers of the turns, ascending."""
        every = len(entry.turns)
        if not self.turns or every <= self.turns:
            return tuple(range(every))
        rng = np.random.default_rng([self.seed, 1, number])
        return tuple(sorted(rng.choice(every, size=self.turns, replace=False).tolist()))


def held_out(entries: Sequence[Entry], amount: int) -> tuple[list[Entry], list[Entry]]:
    """The entries that are trained on, and the last ones, on which the loss is only measured.

    Entries that share a picture with the latter are on neither side.
    """
    if not amount:
        return list(entries), []
    last = list(entries[-amount:])
    seen = {file for one in last for file in one.images}
    return [one for one in entries[:-amount] if seen.isdisjoint(one.images)], last
