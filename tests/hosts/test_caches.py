"""Cache layers of the host that ours take the place of: what they do else is told at attach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers.cache_utils import DynamicCache, DynamicLayer

from tiny import model
from vlmprune import PLPHP, FastV, VisPruner, VlmpruneError
from vlmprune.hosts import caches

Change = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _looked_at_anew() -> Iterator[None]:
    """What was found of a class is remembered, which here changes behind it."""
    caches._difference.cache_clear()
    yield
    caches._difference.cache_clear()


def adds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DynamicLayer, "rotate", lambda self, angle: None, raising=False)


def drops(patch: pytest.MonkeyPatch) -> None:
    for cls in DynamicLayer.__mro__:
        if "crop" in vars(cls):
            patch.delattr(cls, "crop")


def takes_more(patch: pytest.MonkeyPatch) -> None:
    plain = DynamicLayer.reorder_cache
    patch.setattr(
        DynamicLayer, "reorder_cache", lambda self, beam_idx, batch: plain(self, beam_idx)
    )


def forgets(patch: pytest.MonkeyPatch) -> None:
    plain = DynamicLayer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        del self.values

    patch.setattr(DynamicLayer, "__init__", init)


CHANGES: dict[str, tuple[Change, str]] = {
    "a method more": (adds, "has a method rotate"),
    "a method less": (drops, "has no crop"),
    "an argument more": (takes_more, "takes beam_idx, batch in reorder_cache"),
    "no values": (forgets, "has no values"),
}


@pytest.mark.parametrize(("pruner", "ours"), [(FastV(keep=4), "GappedLayer"), (PLPHP(), "Ragged")])
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_does_something_else_is_refused_at_attach(
    name: str, pruner: Any, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, why = CHANGES[name]
    built = model()
    pruner.attach(built).detach()
    caches._difference.cache_clear()
    change(monkeypatch)
    said = rf"^DynamicLayer of transformers \S+ {why}, which {ours}\w* of vlmprune does not know;"
    with pytest.raises(VlmpruneError, match=said):
        pruner.attach(built)
    # What leaves the cache alone asks nothing of its layers.
    VisPruner(keep=4).attach(built).detach()


def test_a_cache_of_other_layers_is_refused_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DynamicCache.__init__

    class Another(DynamicLayer):
        """Of the same kind, by another name."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.layer_class_to_replicate = Another

    monkeypatch.setattr(DynamicCache, "__init__", init)
    with pytest.raises(VlmpruneError, match="is made of Another, not of DynamicLayer, and cannot"):
        PLPHP().attach(model())


def test_another_class_than_ours_is_made_from_is_refused() -> None:
    said = r"^int of transformers .* is another class than it was, which DynamicLayer of vlmprune"
    with pytest.raises(VlmpruneError, match=said):
        caches.check_layers(int, DynamicLayer)
