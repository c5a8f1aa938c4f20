"""What is left of an encoder's output, in the forms in which a host asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import outputs
from vlmprune.hosts.families.media import Medium


@dataclass(frozen=True)
class Pruned:
    """One modality's encoder output, with fewer visual tokens.

    Attributes:
        medium: the modality.
        output: what the host's own method returned, for its class and other fields; None where
            the features were stored.
        features: [k, D] kept visual tokens of each item, in the order of encoding.
        extra: the same for later layers, layer by layer.
        rows: items of each row of the batch.
        flat: whether the host has the items of `extra` as one tensor a layer.
        order: for each item, which of its kept tokens in their order stands at each place; None
            as they lie in it.
        cls: the class of outputs where the features were stored.
        kept: [n] bool of each item; None where it is not known.
        again: encodes all items once more as the host does, asked for more (its states, its
            attention); None where it cannot.
        shown: what was handed to the host in another form than users are to see, with that.
    """

    medium: Medium
    output: Any
    features: list[Tensor]
    extra: list[list[Tensor]]
    rows: list[int]
    flat: bool = False
    order: list[Tensor] | None = None
    cls: type = outputs.ENCODED
    kept: list[Tensor] | None = None
    again: Callable[[Mapping[str, Any]], Any] | None = None
    shown: list[tuple[Any, Any]] = field(default_factory=list)

    def listed(self) -> Any:
        """The output with a list of items, which `generate` can repeat for beams."""
        return self._made(list(self.features), [list(layer) for layer in self.extra], self.output)

    def formed(self, times: int, more: Mapping[str, Any] | None = None) -> Any:
        """The output as the host's forward wants it, each row's items `times` times.

        Args:
            times: how often each row stands in the batch.
            more: what else the host asks of its encoder; None for nothing.
        """
        order = self._repeated_items(times)
        features = [self.features[i] for i in order]
        extra = [[layer[i] for i in order] for layer in self.extra]
        like = self.again(more) if more and self.again is not None else self.output
        made = self._made(features, extra, like, whole=True)
        held = None if self.output is None else self.medium.shown(self.output)
        if held is None or self.kept is None or times > 1:
            return self.medium.form(made)
        shown = outputs.in_form(held, features, self.kept, self.order is not None)
        if shown is not None and self.medium.takes_own and outputs.same_form(held, shown):
            outputs.set_tokens(made, shown)
            return made
        made = self.medium.form(made)
        if shown is not None:
            self.shown.append((self.medium.shown(made), shown))
        return made

    def rows_of(self, times: int) -> Tensor:
        """[n, D] the visual tokens of all rows of a batch, each row `times` times."""
        return torch.cat([self.features[i] for i in self._repeated_items(times)])

    def _repeated_items(self, times: int) -> list[int]:
        """Numbers of the items, each row's `times` times."""
        order, start = list[int](), 0
        for count in self.rows:
            order += list(range(start, start + count)) * times
            start += count
        return order

    def repeated(self, ahead: Any, times: int) -> Any:
        """What `generate` made of `listed`, as the host's forward wants it.

        Some releases repeat the items of a row one by one where they should repeat the rows, and
        some classes are left with none, for they count them by a placeholder that prompts lack.

        Args:
            ahead: of it, all items, or those of a chunk of the prompt.
            times: how often each row stands in the batch.
        """
        held = outputs.tokens_of(ahead)
        whole = [len(one) for one in self.features] * times
        if times > 1 and isinstance(held, list | tuple):
            found = sum(map(len, held))
            if found in (0, sum(whole)):
                return self.formed(times)
        return self.medium.form(ahead)

    def _made(
        self, features: list[Tensor], extra: list[list[Tensor]], like: Any, whole: bool = False
    ) -> Any:
        # As the host has them: older releases do not part the items.
        deep: list[Any] = [torch.cat(e) for e in extra] if self.flat else extra
        return outputs.encoded(like, self.cls, features, deep, whole)


def as_shown(result: Any, pruned: Iterable[Pruned]) -> Any:
    """What a forward returned, with the visual tokens in the form in which users know them."""
    return outputs.with_shown(result, [pair for one in pruned for pair in one.shown])
