"""What a step does not read, as one token: against a plain softmax over the keys and their mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recall_plain import plain
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import recall, recall_cpu
from vlmprune.runtime.attention.recall import Read
from vlmprune.runtime.attention.recalled import Recalled

SCALE = 0.4
IMAGES = torch.tensor([[0] * 9 + [1] * 6, [0] * 5 + [-1] * 10])
KEEP = torch.tensor([[3, 2], [2, 0]])


def recalled(heads: int, rest: Any, keep: Tensor = KEEP, place: Any = "device") -> Recalled:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, heads, 15, 8, generator=generator)
    tokens = torch.tensor([[9, 6], [5, 0]])
    columns = torch.arange(15).expand(2, -1)
    kind: Any = "exact" if place == "device" else "int8"
    return Recalled.of(keys, values, IMAGES, columns, tokens, keep, kind, place, rest)


def call(heads: int, queries: int = 4) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, queries, 1, 8, generator=generator)
    keys, values = torch.randn(2, 2, heads, 7, 8, generator=generator)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., :2] = False
    return AttentionCall(nn.Identity(), query, keys, values, mask, {"scaling": SCALE})


def wanted(asked: AttentionCall, held: Recalled, read: Read, rest: str) -> Tensor:
    return plain(asked, held, read.mask(held, held.store.keys.shape[1]), rest == "mean")


@pytest.mark.parametrize("heads", [4, 2])
def test_equals_a_softmax_with_one_token_for_the_others(heads: int) -> None:
    asked, results = call(heads), {}
    for rest in ("none", "mean"):
        held = recalled(heads, rest)
        found, read = recall.attend(asked, held)
        results[rest] = found
        torch.testing.assert_close(
            found[:, :, 0].double(), wanted(asked, held, read, rest), atol=1e-6, rtol=0
        )
    # Control: it is not what a softmax over what is read gives.
    assert (results["mean"] - results["none"]).abs().max() > 1e-2


def test_nothing_stands_for_nothing() -> None:
    """Where a sample reads everything, beside one that does not."""
    keep = torch.tensor([[3, 2], [5, 0]])
    asked = call(2)
    some, none = (recall.attend(asked, recalled(2, rest, keep))[0] for rest in ("mean", "none"))
    torch.testing.assert_close(some[1], none[1], atol=1e-6, rtol=0)
    assert (some[0] - none[0]).abs().max() > 1e-2


def test_the_sum_goes_along() -> None:
    """Through choices of samples, a cut, a copy and another store; and its bytes are counted."""

    def summed(held: Recalled) -> Tensor:
        return (held.store.whole()[1] * held.real[:, None, :, None]).sum(dim=2)

    held = recalled(2, "mean", place="host")
    picked = held.select(torch.tensor([1, 0, 0]))
    cut = held.before(4)
    for one in (held, picked, cut, held.to(torch.device("cpu")), copy.deepcopy(held)):
        assert one.total is not None
        torch.testing.assert_close(one.total, summed(one), atol=1e-5, rtol=0)
    assert not torch.equal(held.total, cut.total)
    bare = recalled(2, "none", place="host")
    assert bare.total is None
    assert held.device_bytes - bare.device_bytes == held.total.nbytes == 2 * 2 * 8 * 4
    assert held.bytes_read - bare.bytes_read == held.total.nbytes
    # What is read after a cut leaves more of the same image out.
    found, read = recall.attend(call(2), cut)
    torch.testing.assert_close(
        found[:, :, 0].double(), wanted(call(2), cut, read, "mean"), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_values_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    values = torch.full((1, 1, 300, 4), 1000.0, dtype=dtype)
    values[..., 1::2, :] += 8
    summed = recall_cpu.summed(values, None)
    assert summed.dtype == torch.float32 and torch.equal(summed, values.double().sum(2).float())
    seen = torch.arange(300)[None, None] < 200
    assert torch.equal(recall_cpu.summed(values, seen), values[:, :, :200].double().sum(2).float())
