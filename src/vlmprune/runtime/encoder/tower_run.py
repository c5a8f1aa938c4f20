"""A run of a vision tower as methods that act inside it see and change it: their common base."""

from __future__ import annotations

from torch import Tensor, nn

from vlmprune.views import Inside


class TowerRun:
    """A run of a tower in which nothing happens; subclasses act.

    Attributes:
        inside: what is to happen.
        shared: for each crop [N], as in `EncoderView`; empty where nothing happens.
    """

    def __init__(self, inside: Inside | None) -> None:
        self.inside = inside
        self.shared: list[Tensor] = []

    def per_patch(self, layer: nn.Module | None, rows: list[Tensor]) -> list[Tensor]:
        """Attention to a layer's tokens [B, T], handed out to those that the tower began with.

        Tokens that became one share equally what it gets, and those that left get nothing. None
        is a head behind all layers.
        """
        return rows

    def words(self, scored: str) -> str:
        """What was looked at; `scored` says which attention was read besides."""
        if self.inside is None:
            return scored
        return self.inside.words if self.inside.alone else f"{self.inside.words}; {scored}"
