"""Logits of a plain forward, of which the shorter request has fewer than the user has columns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import outputs
from vlmprune.hosts.requests import ModelCall
from vlmprune.runtime.attachment import Attachment


@dataclass(frozen=True)
class FullLogits:
    """Where the logits of the columns that the user wants are among those of the shorter request.

    Attributes:
        places: [B, n] number of each among those that the host is asked for.
        silent: [B, n] bool; the columns that foretell nothing.
        picks: what the host is asked for: the last columns by number, or [m]; None for all.
    """

    places: Tensor
    silent: Tensor
    picks: int | Tensor | None = None

    def asked(self, call: ModelCall) -> ModelCall:
        """The shorter call, asking for these."""
        return call if self.picks is None else call.with_(picks=self.picks)

    def put(self, result: Any) -> Any:
        """What the host returned, with logits at the user's own columns.

        Raises:
            VlmpruneError: it holds no logits.
        """
        return outputs.logits_at(result, self.places, self.silent)


def full_logits(call: ModelCall, columns: Tensor, silent: Tensor, length: int) -> FullLogits:
    """Find the logits that the user wants.

    Args:
        call: the user's.
        columns: [B, L] which column of the shorter request stands for each of the user's.
        silent: [B, L] bool; the columns that foretell nothing.
        length: new columns of the shorter request.
    """
    picks = call.picks
    if picks is None:
        return FullLogits(columns, silent)
    if isinstance(picks, Tensor):
        chosen = picks.to(columns.device)
        asked, places = columns[:, chosen].unique(return_inverse=True)
        return FullLogits(places, silent[:, chosen], asked)
    own = columns[:, -picks:]
    first = int(own.min())
    return FullLogits(own - first, silent[:, -picks:], length - first)


def tell_short(attachment: Attachment, call: ModelCall, columns: Tensor, length: int) -> None:
    """Warn, once an attachment, that logits are of fewer columns than the user's.

    Not where a training step has its loss made by the model, nor where the last columns are asked
    for by number and are all there.

    Args:
        attachment: of the method to the model.
        call: the user's.
        columns, length: as `full_logits` takes them.
    """
    if attachment.logits is not None or attachment.told:
        return
    if call.labels is not None and torch.is_grad_enabled():
        return
    if isinstance(call.picks, int):
        own = columns[:, -call.picks :]
        due = torch.arange(length - own.shape[1], length, device=own.device)
        if bool((own == due).all()):
            return
    attachment.told = True
    warnings.warn(
        f"logits of {type(attachment.model).__name__} are of the {length} columns that pruning "
        f"left of {columns.shape[1]}, so that columns counted in input_ids miss theirs; attach "
        "with logits='full' to have them at your own columns, or with logits='short' if you count "
        "those that are left.",
        stacklevel=2,
    )
