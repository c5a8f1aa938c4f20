"""Packed samples: several in a row of one plain forward, told apart by positions that start anew.

Transformers reads the borders off the positions where a call has neither a mask nor a cache. We
take the samples apart into a padded batch, prune that as any other, and put what is left together
again, so that each sample is pruned as if it came alone. Where the positions that are due would
show other borders, an explicit mask keeps the samples apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import config, decoder
from vlmprune.hosts.release import reason_here
from vlmprune.hosts.requests import ALIGNED, LABELS, SHIFTED, ModelCall
from vlmprune.runtime.attachment import Attachment
from vlmprune.runtime.call.refusals import check_packable, check_unpacked
from vlmprune.runtime.call.state import Active


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed batch lie.

    Attributes:
        lengths: columns of the samples of each row.
    """

    lengths: Sequence[Sequence[int]]

    @property
    def flat(self) -> list[int]:
        """Columns of each sample, row by row."""
        return [n for row in self.lengths for n in row]

    def apart(self, attachment: Attachment, call: ModelCall) -> ModelCall:
        """The call with a sample a row, padded on the left, and with a mask."""
        ids, positions = call.ids, _positions(call)
        assert ids is not None and positions is not None
        aligned = {
            name: self._apart(call.given[name], padding)
            for name, padding in ALIGNED.items()
            if isinstance(call.given.get(name), Tensor)
        }
        return call.also(aligned).with_(
            ids=self._apart(ids, attachment.pad_id),
            mask=self._apart(torch.ones_like(ids), 0),
            positions=self._apart(positions, 0),
        )

    def together(self, attachment: Attachment, call: ModelCall, state: Active) -> ModelCall:
        """The pruned call with its samples in the rows that they came in.

        Rows of unequal length are padded on the left, each column of padding a sample of its own.

        Args:
            attachment: of the method to the model.
            call: the pruned one, a sample a row.
            state: of the call, which is told what becomes of it.
        """
        ids, mask, positions = call.ids, call.mask, call.positions
        assert ids is not None and mask is not None and positions is not None
        real = mask != 0
        left = real.sum(dim=1).tolist()
        longest = max(map(sum, self._rows(left)))
        width = [longest - sum(row) for row in self._rows(left)]

        def row(values: Tensor, padding: Sequence[int]) -> Tensor:
            each = zip(values.unbind(dim=-2), real, strict=True)
            parts = [one[..., keep] for one, keep in each]
            rows = [torch.cat(part, dim=-1) for part in self._rows(parts)]
            filled = zip(rows, width, padding, strict=True)
            return torch.stack(
                [nn.functional.pad(one, (n, 0), value=value) for one, n, value in filled], dim=-2
            )

        def rows(values: Tensor, padding: int) -> Tensor:
            return row(values, [padding] * len(width))

        sizes = [[1] * n + own for n, own in zip(width, self._rows(left), strict=True)]
        samples = _numbered(sizes, ids.device)
        aligned = {
            name: rows(call.given[name], padding)
            for name, padding in ALIGNED.items()
            if isinstance(call.given.get(name), Tensor)
        }
        dropped, typed = sum(left) < sum(self.flat), bool(aligned.keys() - {LABELS, SHIFTED})
        if dropped:
            _check_parted(attachment, longest, typed)
        if LABELS in aligned and dropped:
            # What comes to stand before a sample's first column must not begin to predict it.
            first = _begins(samples)
            aligned[LABELS] = aligned[LABELS].masked_fill(first, ALIGNED[LABELS])
        if positions.ndim == 3:
            # The first of four only tells samples apart.
            placed = rows(positions, 0)
            placed[0] = torch.cat([torch.arange(n) for row in sizes for n in row]).view_as(samples)
        else:
            # Padding that has the position of the column behind it neither counts up to that nor
            # to the padding before.
            firsts = [positions[i][real[i]][0] for i in self._first_of_rows()]
            placed = row(positions, [int(first) for first in firsts])
        apart = None
        if positions.ndim == 2 and not torch.equal(borders(placed), _begins(samples)):
            apart = _blocks(attachment, samples, typed)
        short = call.also(aligned).with_(
            ids=rows(ids, attachment.pad_id), mask=apart, positions=placed
        )
        short = short.with_packing([n for row in sizes for n in row], samples)
        state.batch = state.rows = len(self.lengths)
        state.columns = longest
        state.progress = replace(state.progress, positions=placed, columns=longest, ids=short.ids)
        return short

    def columns(self, columns: Tensor | None, mask: Tensor) -> Tensor | None:
        """[B, L] which column of the pruned call stands for each that the user gave.

        Args:
            columns: the same of the samples apart; None where they are the same.
            mask: [N, S] of the samples apart, after pruning.
        """
        if columns is None:
            return None
        left = (mask != 0).sum(dim=1).tolist()
        longest = max(map(sum, self._rows(left)))
        out = list[Tensor]()
        for own, kept, places in zip(
            self.lengths, self._rows(left), self._rows(list(columns)), strict=True
        ):
            at, parts = longest - sum(kept), list[Tensor]()
            for length, n, place in zip(own, kept, places, strict=True):
                parts.append(place[-length:] - (mask.shape[1] - n) + at)
                at += n
            out.append(torch.cat(parts))
        return torch.stack(out)

    def rows(self, values: Tensor) -> Tensor:
        """[B, L] what [N, ..] of the samples apart, padded on the left, is in their rows."""
        each = zip(self.flat, values, strict=True)
        parts = self._rows([one[one.shape[0] - length :] for length, one in each])
        return torch.stack([torch.cat(row) for row in parts])

    def _first_of_rows(self) -> list[int]:
        """Number of the first sample of each row."""
        counts = torch.tensor([0, *(len(row) for row in self.lengths)]).cumsum(dim=0)
        return [int(n) for n in counts[:-1]]

    def _rows(self, samples: Sequence[Any]) -> list[list[Any]]:
        """What there is of each sample, row by row."""
        counts = [len(row) for row in self.lengths]
        starts = self._first_of_rows()
        return [list(samples[at : at + n]) for at, n in zip(starts, counts, strict=True)]

    def _apart(self, values: Tensor, padding: int) -> Tensor:
        """[.., N, longest sample and one] of [.., B, L].

        With the one all are padded, and a label of a first column stays as long as none is dropped.
        """
        longest, out = max(self.flat) + 1, list[Tensor]()
        for number, own in enumerate(self.lengths):
            for part in values[..., number, :].split(list(own), dim=-1):
                missing = longest - part.shape[-1]
                out.append(nn.functional.pad(part, (missing, 0), value=padding))
        return torch.stack(out, dim=-2)


def packing_of(attachment: Attachment, call: ModelCall, caching: bool) -> Packing | None:
    """Where packed samples lie in a plain forward; None where there are none.

    Args:
        attachment: of the method to the model.
        call: the forward.
        caching: whether it fills or goes on with a cache.

    Raises:
        VlmpruneError: there are, and they cannot be pruned and kept apart.
    """
    ids, positions = call.ids, _positions(call)
    if ids is None or call.mask is not None or positions is None or call.cache is not None:
        check_unpacked(call)
        return None
    told = positions if positions.ndim == 2 else positions[0]
    if attachment.family.rope is not None and len(positions) != 4:
        # Nothing tells the host of samples here, which start where no position goes up.
        check_unpacked(call)
        if bool(_starts_anew(positions).any()):
            raise VlmpruneError(
                f"position_ids of shape {tuple(positions.shape)} start anew within a row, which "
                f"{type(attachment.model).__name__} does not take for packed samples; pass "
                "[4, batch, length] position_ids whose first row counts each sample's columns."
            )
        return None
    begins = borders(told)
    if caching:
        check_unpacked(call)
        if bool((told.diff(dim=1) <= 0).any()):
            raise VlmpruneError(
                "position_ids start anew within a row, as packed samples do, which transformers "
                "does not keep apart in a call that fills a cache; pass use_cache=False."
            )
        return None
    if not bool(begins[:, 1:].any()) and not call.packing:
        return None
    check_packable(attachment)
    ends = [[*row.nonzero()[:, 0].tolist(), row.shape[0]] for row in begins]
    lengths = [[b - a for a, b in pairwise(row)] for row in ends]
    call.check_packing([n for row in lengths for n in row], _numbered(lengths, ids.device))
    return Packing(lengths)


def borders(positions: Tensor) -> Tensor:
    """[B, L] bool; the columns at which the host sees a sample begin, by their positions [B, L]."""
    before = positions[:, :1] - 2
    return positions.diff(dim=1, prepend=before) != 1


def _starts_anew(positions: Tensor) -> Tensor:
    """[B, L] bool; columns none of whose three positions (or one) is higher than before."""
    wide = positions if positions.ndim == 3 else positions[None]
    return (wide.diff(dim=-1) <= 0).all(dim=0)


def _positions(call: ModelCall) -> Tensor | None:
    """[B, L], [3, B, L] or [4, B, L] positions, on the device of the ids."""
    positions, ids = call.positions, call.ids
    if positions is None or ids is None or positions.shape[-1] != ids.shape[1]:
        return None
    wide = positions.to(ids.device)
    return wide.expand(*wide.shape[:-2], len(ids), -1)


def _begins(samples: Tensor) -> Tensor:
    """[B, S] bool; the first column of each sample."""
    return samples.diff(dim=1, prepend=samples[:, :1] - 1) != 0


def _numbered(lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[B, S] the number of each column's sample in its row."""
    rows = [
        torch.arange(len(row)).repeat_interleave(torch.tensor(row, dtype=torch.long))
        for row in lengths
    ]
    return torch.stack(rows).to(device)


def _check_parted(attachment: Attachment, columns: int, typed: bool) -> None:
    """Refuse a host that does not keep packed samples apart by itself; whole ones are its own.

    Args:
        attachment: of the method to the model.
        columns: of the longest row that is left.
        typed: whether columns come with types.
    """
    model, why = attachment.model, ""
    recurrent = config.recurrent_kinds(model.config)
    tempered = config.tempered_from(model.config)
    if recurrent:
        why = f"its {recurrent[0]} layers carry what they saw from one into the next"
    elif tempered is not None and columns >= tempered:
        why = f"it scales queries by their number in the row from token {tempered} on"
    elif typed:
        why = reason_here(attachment.family.mixes)
    if why:
        raise VlmpruneError(
            f"{type(model).__name__} does not keep packed samples apart, for {why}; pad the "
            "samples instead."
        )


def _blocks(attachment: Attachment, samples: Tensor, typed: bool) -> Tensor:
    """[B, 1, S, S] additive mask by which each column sees those before it in its sample.

    Args:
        attachment: of the method to the model.
        samples: [B, S] number of each column's sample.
        typed: whether columns come with types, by which some may see what is behind them.

    Raises:
        VlmpruneError: the model does not take such a mask, or needs another in some layers.
    """
    model = attachment.model
    kind = config.attention_implementation(config.of_text(model.config))
    kinds = config.layer_kinds(model.config)
    even = len(decoder.full_attention_layers(model)) == len(kinds)
    if kind not in ("eager", "sdpa") or not even or typed:
        what = kind if kind not in ("eager", "sdpa") else type(model).__name__
        raise VlmpruneError(
            f"positions='original' leaves gaps in packed samples that {what} takes for borders "
            "between samples; use positions='compact'."
        )
    size = samples.shape[1]
    sees = samples[:, :, None] == samples[:, None, :]
    sees &= torch.ones(size, size, dtype=torch.bool, device=samples.device).tril()
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=samples.device)
    return mask.masked_fill(~sees, lowest)[:, None]
