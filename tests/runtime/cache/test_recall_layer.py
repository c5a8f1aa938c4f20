"""The cache layer that is read in part: every operation that Transformers' caches have."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE
from masked import masking
from step_masks import mask_of
from stock import CACHE, cache_of
from tiny import IMAGE, model, request
from vlmprune import Recall
from vlmprune.runtime.cache import bound_cache
from vlmprune.runtime.cache.bound_cache import binding_of

# Nothing stands for what is not read, so that a mask says all that a step sees.
WATCHED: dict[str, Any] = {"read": 3, "floor": 0, "rest": "none", "watch": "tokens"}
OPERATIONS = ["none", "reorder", "repeat", "select", "crop the tail", "crop the prompt", "offload"]
ROWS = {"reorder": [1, 0], "repeat": [0, 0, 0, 1, 1, 1], "select": [1]}


def filled(built: Any, store: Any, rows: list[int]) -> tuple[Any, Any, Tensor, Tensor]:
    """A cache to be read in part and a full one after a prompt, its mask and visual tokens."""
    req = request(built, rows)
    with torch.no_grad():
        full = cache_of(built(**req.inputs))
        with Recall(**WATCHED, store=store)(built):
            ours = cache_of(built(**req.inputs))
    return ours, full, req.inputs["attention_mask"], req.inputs["input_ids"] == IMAGE


def operate(held: Any, name: str) -> None:
    if name == "reorder":
        held.reorder_cache(torch.tensor(ROWS[name]))
    elif name == "repeat":
        held.batch_repeat_interleave(3)
    elif name == "select":
        held.batch_select_indices(torch.tensor(ROWS[name]))
    elif name == "crop the tail":
        held.crop(-1)
    elif name == "crop the prompt":
        held.crop(-9)
    elif name == "offload":
        for layer in held.layers:
            layer.offload()
            layer.prefetch()


def step(built: Any, held: Any, mask: Tensor) -> Tensor:
    """Logits of a further token over a cache."""
    ids = torch.full((len(mask), 1), 10)
    mask = torch.cat((mask, torch.ones_like(ids)), 1)
    positions = mask.cumsum(1)[:, -1:] - 1
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return built(**given, **{CACHE: held}).logits


def driven(built: Any, held: Any, mask: Tensor) -> Tensor:
    """`step` over a cache that is read in part, without a pruner's record of whole prompts."""
    layers = built.model.language_model.layers
    with bound_cache.attending(held, {i: x.self_attn for i, x in enumerate(layers)}, None):
        return step(built, held, mask)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("store", ["device", "host"])
def test_operations_equal_those_of_a_masked_cache(name: str, store: Any) -> None:
    built = model()
    ours, full, mask, visual = filled(built, store, [1, 2])
    if name == "crop the tail":
        driven(built, ours, mask)
        step(built, full, mask)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
        assert ours.get_seq_length() == mask.shape[1]
    for held in (ours, full):
        operate(held, name)
    cut = {"crop the tail": 1, "crop the prompt": 9}.get(name, 0)
    mask = mask[ROWS.get(name, [0, 1])][:, : mask.shape[1] - cut]
    visual = visual[ROWS.get(name, [0, 1])][:, : mask.shape[1]]
    assert ours.get_seq_length() == full.get_seq_length() == mask.shape[1]
    reading = binding_of(ours).reading
    for _ in range(2):
        unmasked = step(built, copy.deepcopy(full), mask)
        found = driven(built, ours, mask)
        columns = ours.layers[0].prefix.columns
        own = visual[:, : int(visual.shape[1])]
        seen = mask_of(reading.steps[-1], own, columns)
        with masking(built, seen):
            expected = step(built, full, mask)
        assert float((found - expected).abs().max()) < TOLERANCE
        assert float((found - unmasked).abs().max()) > DIFFERENT
        mask = torch.cat((mask, torch.ones(len(mask), 1, dtype=mask.dtype)), 1)


def test_a_beam_that_takes_anothers_place_copies_no_visual_token() -> None:
    built = model()
    ours, _, _, _ = filled(built, "device", [1, 1])
    for layer in ours.layers:
        layer.alike = torch.tensor([0, 0])
    before = [layer.prefix for layer in ours.layers]
    ours.reorder_cache(torch.tensor([1, 1]))
    assert all(layer.prefix is one for layer, one in zip(ours.layers, before, strict=True))
    for layer in ours.layers:
        layer.alike = torch.tensor([0, 1])
    ours.reorder_cache(torch.tensor([1, 1]))
    for layer, one in zip(ours.layers, before, strict=True):
        assert torch.equal(layer.prefix.store.keys[0], one.store.keys[1])


def test_reset_forgets_everything() -> None:
    built = model()
    req = request(built, [1])
    given = {"max_new_tokens": 3, "do_sample": False}
    with Recall(**WATCHED)(built):
        fresh = built.generate(**req.inputs, **given)
        ours, _, _, _ = filled(built, "device", [1])
        ours.reset()
        assert ours.get_seq_length() == 0
        assert all(layer.nbytes() == layer.host_nbytes() == 0 for layer in ours.layers)
        again = built.generate(**req.inputs, **given, **{CACHE: ours})
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("store", ["device", "host"])
def test_pickled_and_copied_caches_are_whole(store: Any) -> None:
    built = model()
    ours, _, mask, _ = filled(built, store, [1, 2])
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        one, two = driven(built, copy.deepcopy(ours), mask), driven(built, other, mask)
        assert torch.equal(one, two)
        assert other.layers[0].prefix.host_bytes == ours.layers[0].prefix.host_bytes


def test_what_is_on_the_host_is_a_mapped_file(tmp_path: Path, monkeypatch: Any) -> None:
    """It is gone from the folder at once, and is memory of the process no more than it is read."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    built = model()
    ours, _, _, _ = filled(built, "host", [1])
    assert not list(tmp_path.iterdir())
    store = ours.layers[0].prefix.store
    maps = Path("/proc/self/maps").read_text()
    address = store.keys.data_ptr()
    line = next(
        line
        for line in maps.splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    )
    assert "vlmprune-recall-" in line and str(tmp_path) in line


def test_no_room_for_a_file_is_one_sentence(monkeypatch: Any) -> None:
    from vlmprune import VlmpruneError
    from vlmprune.runtime.attention import recalled

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recalled.os, "posix_fallocate", full)
    built = model()
    with pytest.raises(VlmpruneError, match=r"find no room in .* name another folder with TMPDIR"):
        filled(built, "host", [1])
