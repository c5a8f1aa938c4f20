"""Taps: the attention rows of fast attention are those of eager attention, and nothing stays."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tapped_towers import eager_weights, layers_of, nothing_stays, pixels, seen, tower
from vlmprune.hosts.attention import read
from vlmprune.runtime.attention import taps
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.views.settings import TapRows

TOWERS = ("clip", "dinov2")
_stays = pytest.fixture(autouse=True)(nothing_stays)


@jaxtyped(typechecker=beartype)
def attention_rows(
    query: Float[Tensor, "B H L D"], key: Float[Tensor, "B G L D"], scaling: float, rows: TapRows
) -> Float[Tensor, "B L"]:
    return taps.attention_rows(read(nn.Identity(), query, key, scaling), rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_cls_row_is_that_of_eager_attention(kind: str, attention: str) -> None:
    want = eager_weights(kind)
    model = tower(kind, attention)
    for layer in range(3):
        row = seen(model, layer, "cls")
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, want[layer].mean(dim=1)[:, 0], rtol=0, atol=1e-6)
        # Controls: another layer's row, another query's, one head's, are far away.
        assert (row - want[layer - 1].mean(dim=1)[:, 0]).abs().max() > 1e-2
        assert (row - want[layer].mean(dim=1)[:, 1]).abs().max() > 1e-2
        assert (row - want[layer][:, 0, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 5, 128])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_received_is_the_column_mean(
    kind: str, attention: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "CHUNK", chunk)
    want = [weights.mean(dim=(1, 2)) for weights in eager_weights(kind)]
    row = seen(tower(kind, attention), 1, "received")
    torch.testing.assert_close(row, want[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(row.sum(dim=1), torch.ones(2))
    assert (row - want[0]).abs().max() > 1e-3
    assert (row - eager_weights(kind)[1].mean(dim=1)[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tap_changes_nothing_in_the_output(kind: str) -> None:
    model = tower(kind, "sdpa")
    with torch.no_grad():
        plain = model(pixels()).last_hidden_state
        with tapped(layers_of(model)[1], Tap("cls")):
            assert torch.equal(model(pixels()).last_hidden_state, plain)


def test_one_row_a_forward() -> None:
    model, tap = tower("clip", "sdpa"), Tap("cls")
    with torch.no_grad(), tapped(layers_of(model)[1], tap):
        for images in (1, 3):
            model(pixels(images=images))
    assert [tuple(row.shape) for row in tap.rows_seen] == [(1, 17), (3, 17)]
    with torch.no_grad():
        model(pixels())
    assert len(tap.rows_seen) == 2, "nothing is recorded after the block"


def test_several_taps_on_one_model() -> None:
    model = tower("clip", "sdpa")
    want = [weights.mean(dim=1) for weights in eager_weights("clip")]
    rows = [Tap("cls"), Tap("received"), Tap("cls")]
    with torch.no_grad(), ExitStack() as stack:
        for layer, tap in zip((1, 1, 2), rows, strict=True):
            stack.enter_context(tapped(layers_of(model)[layer], tap))
        model(pixels())
    for layer, tap, row in zip((1, 1, 2), rows, (0, None, 0), strict=True):
        expected = want[layer].mean(dim=1) if row is None else want[layer][:, row]
        torch.testing.assert_close(tap.rows_seen[0], expected, rtol=0, atol=1e-6)


def test_two_models_interleaved() -> None:
    models = [tower("clip", "sdpa", seed=0), tower("clip", "eager", seed=1)]
    want = [eager_weights("clip", seed)[1].mean(dim=1)[:, 0] for seed in (0, 1)]
    first, second = Tap("cls"), Tap("cls")
    with torch.no_grad(), tapped(layers_of(models[0])[1], first):
        models[1](pixels())
        with tapped(layers_of(models[1])[1], second):
            models[0](pixels())
            models[1](pixels())
        models[0](pixels())
    assert len(first.rows_seen) == 2 and len(second.rows_seen) == 1
    for row in first.rows_seen:
        torch.testing.assert_close(row, want[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(second.rows_seen[0], want[1], rtol=0, atol=1e-6)
    assert (want[0] - want[1]).abs().max() > 1e-2


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def largest(query: Tensor, key: Tensor, rows: TapRows) -> int:
    with Sizes() as sizes:
        attention_rows(query, key, 0.5, rows)
    return sizes.largest


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    H, L, D = 4, 600, 8
    query, key = torch.randn(2, 1, H, L, D)
    assert largest(query, key, "cls") == H * L * D, "the keys themselves, nothing larger"
    monkeypatch.setattr(taps, "CHUNK", 32)
    assert largest(query, key, "received") == H * 32 * L
    # Control: with one chunk for all, L × L would be seen.
    monkeypatch.setattr(taps, "CHUNK", L)
    assert largest(query, key, "received") == H * L * L


@pytest.mark.parametrize("rows", ["cls", "received"])
def test_grouped_keys(rows: TapRows) -> None:
    """Several query heads share a key head, in the order that Transformers uses."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 9, 4)
    weights = torch.stack(
        [(query[:, h] @ key[:, h // 3].mT * 0.7).softmax(dim=-1) for h in range(6)], dim=1
    ).mean(dim=1)
    want = weights[:, 0] if rows == "cls" else weights.mean(dim=1)
    torch.testing.assert_close(attention_rows(query, key, 0.7, rows), want, rtol=0, atol=1e-6)
    # Control: heads dealt out in turn are another grouping.
    turned = attention_rows(query, key.flip(1), 0.7, rows)
    assert (turned - want).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_is_in_float32(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 1, 4, 50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    row = attention_rows(query, key, 0.5, "cls")
    assert row.dtype == torch.float32
    assert torch.equal(row, attention_rows(query.float(), key.float(), 0.5, "cls"))


def test_no_gradient_is_kept() -> None:
    model = tower("clip", "sdpa")
    tap = Tap("cls")
    with tapped(layers_of(model)[1], tap):
        model(pixels())
    assert not tap.rows_seen[0].requires_grad


@pytest.mark.parametrize("form", ["bool", "additive", "two-dimensional"])
def test_padding_neither_gives_nor_receives(form: str) -> None:
    """A padded batch scores each row as the row alone would be scored."""
    torch.manual_seed(3)
    query, key = torch.randn(2, 4, 300, 8), torch.randn(2, 4, 300, 8)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[1, 170:] = False
    mask = real[:, None, None]
    if form == "additive":
        mask = torch.zeros(2, 1, 300, 300).masked_fill(~mask, torch.finfo(torch.float32).min)
    elif form == "two-dimensional":
        mask = real.long()
    found = taps.attention_rows(read(nn.Identity(), query, key, 0.3, mask=mask), "received")
    assert torch.allclose(found[:1], attention_rows(query[:1], key[:1], 0.3, "received"))
    alone = attention_rows(query[1:, :, :170], key[1:, :, :170], 0.3, "received")
    assert torch.allclose(found[1:, :170], alone) and not found[1, 170:].any()


def test_images_in_one_masked_sequence_are_scored_apart() -> None:
    """Towers that pack images into one sequence keep them apart by a block-diagonal mask."""
    torch.manual_seed(3)
    query, key = torch.randn(1, 4, 200, 8), torch.randn(1, 4, 200, 8)
    lengths = [60, 140]
    mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in lengths])[None, None]
    found = taps.attention_rows(read(nn.Identity(), query, key, 0.3, mask=mask), "received")
    alone = [
        attention_rows(q, k, 0.3, "received")
        for q, k in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
    ]
    assert torch.allclose(found, torch.cat(alone, dim=1))
    tap = taps.Tap("received")
    ends = torch.tensor([0, 60, 200])
    tap.see(read(nn.Identity(), query, key, 0.3, ends))
    assert torch.equal(torch.cat(tap.rows_seen, dim=1), torch.cat(alone, dim=1))
