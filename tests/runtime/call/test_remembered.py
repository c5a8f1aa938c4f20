"""Caches that were filled under a pruner, in other hands: after it, cropped, reset, reordered."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from answers import DIFFERENT, TOLERANCE
from deep import deep
from said_later import MISREAD, OPTIONS, apart, filled, later, said
from stock import CACHE
from tiny import model, request
from vlmprune import PLPHP, FastV, RandomTokens, Recall, VisPruner, VlmpruneError
from zoo import WINDOWED, ZOO
from zoo.base import IMAGE

pytestmark = pytest.mark.oracle

FAMILIES = ["llava", "qwen2_vl", "internvl", "paligemma", "qwen3_vl"]
FEWER = f"^this cache was filled with fewer visual tokens than its prompt has, and {MISREAD}; con"
RECALL = Recall(read=2, floor=0, always=True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_without_a_pruner_refuses_a_shorter_cache(family: str) -> None:
    """By itself, on a copy too, and it leaves the cache as it is; who reads it is not kept off."""
    built = ZOO[family].build()
    other = ZOO[family].build()
    inputs = ZOO[family].request(built, [["image"]]).inputs
    with VisPruner(keep=0.4)(built):
        cache, answer = filled(built, inputs)
        turn = later(answer, inputs)
        wanted = said(built, copy.deepcopy(cache), turn)
    length = cache.get_seq_length()
    assert length < answer.shape[1] - 1
    assert cache.layers[0].keys.shape[2] == length and len(cache.layers) == 3
    assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
    one = {"input_ids": turn["input_ids"][:, -1:]}
    for held in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for host in (built, other):
            with pytest.raises(VlmpruneError, match=FEWER):
                host.generate(**turn, **{CACHE: held}, **OPTIONS)
            with pytest.raises(VlmpruneError, match=MISREAD):
                host(**one, **{CACHE: held})
        assert held.get_seq_length() == length
        assert torch.equal(held.layers[1].keys, cache.layers[1].keys)
        # Any pruner goes on, one of other positions too.
        with RandomTokens(keep=2)(built):
            assert apart(said(built, copy.deepcopy(held), turn), wanted) == 0

    # Control: what nothing was dropped of serves anywhere.
    with RandomTokens(keep=1.0)(built):
        cache, answer = filled(built, inputs)
    plain, same = filled(built, inputs)
    assert torch.equal(answer, same)
    turn = later(answer, inputs)
    assert apart(said(built, copy.deepcopy(cache), turn), said(built, plain, turn)) == 0
    with VisPruner(keep=0.4)(built):
        assert apart(said(built, cache, turn), wanted) > DIFFERENT


@torch.no_grad()
def test_a_batch_whose_rows_stay_as_long_is_refused_too() -> None:
    """The row without an image fixes the length; the other's columns are missing all the same."""
    built = model()
    req = request(built, [0, 1], text=[40, 3])
    with VisPruner(keep=3)(built):
        cache, answer = filled(built, req.inputs)
    assert cache.get_seq_length() == answer.shape[1] - 1
    with pytest.raises(VlmpruneError, match=MISREAD):
        said(built, cache, later(answer, req.inputs))


@pytest.mark.parametrize("method", [FastV(keep=4), PLPHP(r=0.4), RECALL], ids=repr)
@torch.no_grad()
def test_a_refused_cache_stays_as_it_is(method: Any) -> None:
    """Where later layers lack columns, the first ones do not grow either."""
    built = deep()
    req = request(built, [1])
    with method(built):
        cache, answer = filled(built, req.inputs)
        turn = later(answer, req.inputs)
        wanted = said(built, copy.deepcopy(cache), turn)
        before = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(VlmpruneError, match="continue it with the pruner attached"):
        said(built, cache, turn)
    assert [layer.get_seq_length() for layer in cache.layers] == before
    with method(built):
        assert apart(said(built, cache, turn), wanted) == 0


WAYS: dict[str, Callable[[Any], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "mask": lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
}
ROWS = {"reorder": [1, 0], "select": [1, 0], "repeat": [0, 0, 1, 1], "mask": [1]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_samples_take_their_record_along(family: str, way: str) -> None:
    entry = ZOO[family]
    built = entry.build()
    inputs = entry.request(built, [["image"], ["image", "image"]]).inputs
    with VisPruner(keep=0.4)(built):
        cache, answer = filled(built, inputs)
        turn = later(answer, inputs)
        wanted = said(built, copy.deepcopy(cache), turn)
        WAYS[way](cache)
        taken = {name: one[ROWS[way]] for name, one in turn.items()}
        found = said(built, cache, taken)
    assert torch.equal(found.sequences, wanted.sequences[ROWS[way]])
    for a, b in zip(found.logits, wanted.logits, strict=True):
        assert float((a - b[ROWS[way]]).abs().max()) < TOLERANCE
    assert float((wanted.logits[0][0] - wanted.logits[0][1]).abs().max()) > DIFFERENT


EMPTIES: dict[str, Callable[[Any], None]] = {
    "reset": lambda cache: cache.reset(),
    "crop": lambda cache: cache.crop(-cache.get_seq_length()),
    "layers": lambda cache: [layer.reset() for layer in cache.layers],
}


def zeroed(cache: Any) -> bool:
    """Whether layers that were reset one by one kept their length, as early releases' own do."""
    host = DynamicLayer()
    host.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    host.reset()
    assert bool(cache.get_seq_length()) <= bool(host.get_seq_length())
    return bool(cache.get_seq_length())


@pytest.mark.parametrize("empty", EMPTIES)
@pytest.mark.parametrize(
    "method",
    [VisPruner(keep=3), FastV(keep=4), PLPHP(r=0.4), RECALL, RandomTokens(keep=1.0)],
    ids=repr,
)
@torch.no_grad()
def test_an_emptied_cache_is_as_new(method: Any, empty: str) -> None:
    """For a model alone, for a pruner, and cropped, reordered and repeated after that."""
    built = deep()
    req = request(built, [1])
    other = request(built, [2], seed=5)
    turn_of = {}
    fresh, plain_answer = filled(built, other.inputs)
    turn_of["plain"] = later(plain_answer, other.inputs)
    expected = said(built, copy.deepcopy(fresh), turn_of["plain"])
    with method(built):
        used, _ = filled(built, req.inputs)
        EMPTIES[empty](used)
        if empty == "layers" and zeroed(used):
            # Of single layers nobody tells the cache; only those that lack columns are emptied.
            return
        assert used.get_seq_length() == 0
        again = copy.deepcopy(used)
        _, answer = filled(built, other.inputs, again)
        _, wanted = filled(built, other.inputs)
        assert torch.equal(answer, wanted)

    _, answer = filled(built, other.inputs, used)
    assert torch.equal(answer, plain_answer)
    # What a plain model filled is nothing that a pruner would remember from before.
    with RandomTokens(keep=2)(built):
        assert apart(said(built, copy.deepcopy(used), turn_of["plain"]), expected) < TOLERANCE
    used.batch_repeat_interleave(2)
    used.reorder_cache(torch.tensor([1, 0]))
    used.batch_select_indices(torch.tensor([1]))
    used.crop(-2)
    length = answer.shape[1] - 3
    assert [layer.get_seq_length() for layer in used.layers] == [length] * len(used.layers)
    assert all(layer.keys.shape[2] == length for layer in used.layers)
    assert apart(said(built, used, turn_of["plain"]), expected) < TOLERANCE


@torch.no_grad()
def test_a_window_works_again_after_a_reset() -> None:
    """As the host's own does; early releases leave zeros in the window, and then fail at once."""
    entry = WINDOWED["aya_vision"]
    built = entry.build()
    inputs = entry.request(built, [["image"]]).inputs
    bare, answer = filled(built, inputs)
    with FastV(keep=4, layer=1)(built):
        cache, _ = filled(built, inputs)
    assert any(hasattr(layer, "held") and layer.window for layer in cache.layers)
    for one in (bare, cache):
        one.reset()
    try:
        again = filled(built, inputs, bare)[1]
    except RuntimeError as error:
        assert Version(transformers.__version__) < Version("5.20")
        with pytest.raises(RuntimeError, match="must match") as found:
            filled(built, inputs, cache)
        assert str(found.value) == str(error)
        return
    assert torch.equal(again, answer)
    assert torch.equal(filled(built, inputs, cache)[1], answer)


@torch.no_grad()
def test_cropped_into_the_prompt() -> None:
    """It stays refused when it grows again; whole ones serve a model alone."""
    built = model()
    req = request(built, [1])
    with VisPruner(keep=3)(built):
        cache, answer = filled(built, req.inputs)
        turn = later(answer, req.inputs)
        cache.crop(-8)
        with pytest.raises(VlmpruneError, match="cropped into its pruned prompt"):
            said(built, cache, turn)
    with pytest.raises(VlmpruneError, match=MISREAD):
        said(built, cache, turn)
    with RandomTokens(keep=1.0)(built):
        cache, answer = filled(built, req.inputs)
    turn = later(answer, req.inputs)
    wanted = said(built, copy.deepcopy(cache), turn)
    cache.crop(-8)
    assert apart(said(built, cache, turn), wanted) < TOLERANCE
    with VisPruner(keep=3)(built), pytest.raises(VlmpruneError, match="cropped into its pruned"):
        said(built, cache, later(turn["input_ids"], req.inputs))


@torch.no_grad()
def test_other_kinds_of_cache() -> None:
    built = model()
    req = request(built, [1])
    static = StaticCache(config=built.config.get_text_config(), max_cache_len=80)
    with VisPruner(keep=3)(built):
        _, answer = filled(built, req.inputs, static)
        turn = later(answer, req.inputs)
        wanted = said(built, filled(built, req.inputs)[0], turn)
        assert apart(said(built, copy.deepcopy(static), turn), wanted) < TOLERANCE
    with pytest.raises(VlmpruneError, match=MISREAD):
        said(built, static, turn)
    static.reset()
    assert torch.equal(filled(built, req.inputs, static)[1], filled(built, req.inputs)[1])


class StoppedError(Exception):
    """Ends an answer."""


class Stopping:
    """A streamer that ends the answer."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, _: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError

    def end(self) -> None:
        """Nothing is held back."""


@torch.no_grad()
def test_a_call_that_was_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps the cache is sound, and goes on; within one it is not."""
    built = model()
    req = request(built, [1])
    cache = DynamicCache(config=built.config.get_text_config())
    with VisPruner(keep=3)(built):
        whole, answer = filled(built, req.inputs)
        with pytest.raises(StoppedError):
            built.generate(**req.inputs, **{CACHE: cache}, **OPTIONS, streamer=Stopping(2))
    size = req.inputs["input_ids"].shape[1]
    turn = later(answer[:, : size + 2], req.inputs)
    with pytest.raises(VlmpruneError, match=MISREAD):
        said(built, cache, turn)
    with VisPruner(keep=3)(built):
        whole.crop(cache.get_seq_length() - whole.get_seq_length())
        assert apart(said(built, cache, turn), said(built, whole, turn)) < TOLERANCE

        def broken(*_: Any, **__: Any) -> None:
            raise StoppedError

        half = DynamicCache(config=built.config.get_text_config())
        with monkeypatch.context() as patch:
            patch.setattr(built.model.language_model.layers[1], "forward", broken)
            with pytest.raises(StoppedError):
                built(**req.inputs, **{CACHE: half})
        with pytest.raises(VlmpruneError, match="the call that filled it was broken off"):
            said(built, half, turn)


def test_a_turn_that_failed_before_it_filled_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is what it was, and goes on."""
    built = model()
    req = request(built, [1])
    with VisPruner(keep=3)(built):
        cache, answer = filled(built, req.inputs)
        other, _ = filled(built, req.inputs)
        turn = later(answer, req.inputs)

        def broken(*_: Any, **__: Any) -> None:
            raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(built.model.language_model.layers[0], "forward", broken)
            with pytest.raises(StoppedError):
                said(built, cache, turn)
        assert apart(said(built, cache, turn), said(built, other, turn)) == 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_answer_that_holds_the_image_token(family: str) -> None:
    """It stands for no image: the next turn reads it as the model without a pruner does."""
    entry = ZOO[family]
    built = entry.build()
    inputs = entry.request(built, [["image"]]).inputs

    def only(_: int, __: Tensor) -> list[int]:
        return [IMAGE]

    def talk(again: bool = False) -> tuple[Any, Any]:
        cache = DynamicCache(config=built.config.get_text_config())
        said_so = built.generate(
            **inputs, **{CACHE: cache}, **OPTIONS, prefix_allowed_tokens_fn=only
        )
        assert said_so[0, -4:].tolist() == [IMAGE] * 4
        turn = later(said_so, inputs)
        if again:
            # As a processor that is given the whole conversation brings the picture again.
            turn |= {k: v for k, v in inputs.items() if k not in turn and "token_type" not in k}
        return cache, turn

    cache, turn = talk()
    bare = said(built, cache, turn)
    with RandomTokens(keep=1.0)(built):
        for again in (False, True):
            cache, turn = talk(again)
            assert apart(said(built, cache, turn), bare) == 0
    with VisPruner(keep=0.4)(built):
        cache, turn = talk()
        wanted = said(built, copy.deepcopy(cache), turn)
        assert apart(wanted, bare) > DIFFERENT
        cropped = copy.deepcopy(cache)
        # All of the answer comes anew.
        cropped.crop(-3)
        assert apart(said(built, cropped, talk(True)[1]), wanted) < TOLERANCE
        assert apart(said(built, cache, talk(True)[1]), wanted) == 0


@torch.no_grad()
def test_a_generated_image_token_beside_a_new_image() -> None:
    """The model cannot tell them apart, with a pruner or without; left out, the image serves."""
    built = model()
    req = request(built, [1])
    with VisPruner(keep=3)(built) as handle:
        cache = DynamicCache(config=built.config.get_text_config())
        ends = built.generate(
            **req.inputs, **{CACHE: cache}, **OPTIONS, prefix_allowed_tokens_fn=lambda *_: [IMAGE]
        )
        new = request(built, [1], seed=9).inputs
        ids = torch.cat((ends, new["input_ids"]), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn["pixel_values"] = new["pixel_values"]
        with pytest.raises(VlmpruneError, match="an image placeholder that the model generated"):
            said(built, copy.deepcopy(cache), turn)
        turn["input_ids"] = torch.cat((ends[:, :-1], new["input_ids"]), dim=1)
        turn["attention_mask"] = turn["attention_mask"][:, 1:]
        said(built, cache, turn)
        assert [len(one) for one in handle.report.kept] == [3]
