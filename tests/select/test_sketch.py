"""The sketch of keys: its codes, what it counts, and that it finds what real keys hide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.select.sketch import Sketch, packed, unpacked

BITS = st.sampled_from([2, 4, 8])


def keys_of(
    seed: int, batch: int = 2, heads: int = 3, tokens: int = 20, width: int = 8
) -> tuple[Tensor, Tensor]:
    """Keys, channels of which differ in mean and spread, and which of them there are."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, width, generator=generator)
    keys = keys * torch.rand(width, generator=generator) * 9 + torch.arange(width)
    real = torch.rand(batch, tokens, generator=generator) < 0.8
    return keys, real


@given(st.integers(0, 9999), st.integers(0, 19), BITS)
def test_codes_are_packed_and_taken_apart(seed: int, width: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 5, width), generator=generator, dtype=torch.uint8)
    made = packed(codes, bits)
    assert made.shape == (2, 5, -(-width * bits // 8)) and made.dtype == torch.uint8
    assert torch.equal(unpacked(made, bits)[..., :width], codes)


@given(st.integers(0, 9999), BITS, st.integers(1, 9))
def test_levels_are_as_near_as_the_bits_allow(seed: int, bits: int, width: int) -> None:
    keys, real = keys_of(seed, width=width)
    sketch = Sketch.of(keys, real, bits)
    seen = real[:, None, :, None].expand_as(keys)
    counted = real.sum(dim=1)[:, None, None].clamp(min=1)
    mean = keys.masked_fill(~seen, 0.0).sum(dim=2) / counted
    torch.testing.assert_close(sketch.mean, mean)
    left = (keys - mean[:, :, None]).masked_fill(~seen, 0.0)
    spread = (left.square().sum(dim=2) / counted).sqrt()
    torch.testing.assert_close(sketch.channel, spread)
    left = left / spread.clamp(min=1e-9)[:, :, None]
    # The nearest level, or the outermost where a value lies beyond all.
    step, half = sketch.scale.float()[..., None], (2**bits - 1) / 2
    apart = (sketch.levels() - left).abs()
    beyond = (left.abs() - half * step).clamp(min=0)
    assert (apart <= beyond + step / 2 + 1e-3).masked_select(seen).all()
    # Tokens that there are not have no level but the mean.
    assert not sketch.scale.masked_select(~real[:, None].expand_as(sketch.scale)).any()
    assert not sketch.levels().masked_select(~seen).any()


@given(st.integers(0, 9999), BITS, st.integers(1, 4))
def test_scores_are_products_with_its_keys(seed: int, bits: int, group: int) -> None:
    keys, real = keys_of(seed)
    sketch = Sketch.of(keys, real, bits)
    query = torch.randn(2, 3 * group, 8, generator=torch.Generator().manual_seed(seed))
    wanted = torch.einsum(
        "bhgd,bhvd->bhgv", query.unflatten(1, (3, group)).double(), sketch.keys().double()
    )
    got = sketch.scores(query, 0.3)
    torch.testing.assert_close(got, (wanted * 0.3).flatten(1, 2).float(), atol=1e-4, rtol=1e-5)
    other = Sketch.of(keys.flip(2), real, bits).scores(query, 0.3)
    assert not torch.allclose(got, other, atol=1e-2)


def test_what_never_changes_costs_nothing() -> None:
    keys = torch.full((1, 1, 6, 4), 7.0)
    sketch = Sketch.of(keys, torch.ones(1, 6, dtype=torch.bool), 4)
    assert torch.equal(sketch.keys(), keys)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signed_codes_are_the_same_sketch(bits: int) -> None:
    keys, real = keys_of(0)
    sketch = Sketch.of(keys, real, bits)
    signed = sketch.signed()
    assert signed.codes.dtype == torch.int8 and sketch.codes.dtype == torch.uint8
    assert torch.equal(signed.codes.int() + 128, sketch.codes.int())
    assert torch.equal(signed.keys(), sketch.keys())
    assert signed.nbytes == sketch.nbytes
    assert torch.equal(signed.signed().codes, signed.codes)
    # On the CPU codes are signed, elsewhere they are not.
    assert torch.equal(sketch.to(torch.device("cpu")).codes, signed.codes)
    assert signed.to(torch.device("meta")).codes.dtype == torch.uint8
    # Codes that are read as the other kind are others.
    wrong = Sketch(sketch.codes.view(torch.int8), sketch.scale, sketch.mean, sketch.channel, bits)
    assert not torch.equal(wrong.keys(), sketch.keys())


def test_bytes_are_those_of_all_tensors() -> None:
    keys, real = keys_of(0, batch=2, heads=3, tokens=20, width=10)
    # Ten channels of four bits are five bytes a token; a scale of two; two numbers a channel.
    assert Sketch.of(keys, real, 4).nbytes == 2 * 3 * (20 * (5 + 2) + 10 * 2 * 4)


def test_samples_are_selected() -> None:
    keys, real = keys_of(0, batch=3)
    rows = torch.tensor([2, 0, 2])
    selected = Sketch.of(keys, real, 4).select(rows)
    assert torch.equal(selected.keys(), Sketch.of(keys[rows], real[rows], 4).keys())


def found(keys: Tensor, query: Tensor, scores: Tensor, count: int) -> float:
    """The share of a query's largest products that are among the largest of `scores`."""
    true = (query[:, :, None] * keys).sum(dim=3).topk(count).indices
    marked = torch.zeros(scores.shape, dtype=torch.bool).scatter(2, true, True)
    return float(marked.gather(2, scores.topk(count).indices).float().mean())


def grid(keys: Tensor, bits: int) -> Tensor:
    """Keys in as many bits with one scale a token, neither centred nor scaled by channel."""
    step = keys.abs().amax(dim=3, keepdim=True) * 2 / (2**bits - 1)
    codes = (keys / step + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1)
    return (codes - (2**bits - 1) / 2) * step


@pytest.mark.parametrize(("bits", "least"), [(2, 0.6), (4, 0.85), (8, 0.85)])
def test_planted_channels_hide_little(bits: int, least: float) -> None:
    """One channel is offset by 30 and one thirty times as large, as real decoders have them.

    Of the 180 largest of 2,880 products a sketch of four bits finds 91 %, one of eight 99 %, and
    one of two 68 %, where it would find 71 % without such channels. A plain grid of four bits
    finds 62 %, one of two 40 %.
    """
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 8, 2880, 128, generator=generator)
    query = torch.randn(1, 8, 128, generator=generator)
    keys[..., 5] += 30
    keys[..., 70] *= 30
    sketch = Sketch.of(keys, torch.ones(1, 2880, dtype=torch.bool), bits)
    assert found(keys, query, sketch.scores(query, 1.0), 180) >= least
    plain = (grid(keys, bits) * query[:, :, None]).sum(dim=3)
    # Eight bits have levels to spare even for a channel like that.
    assert found(keys, query, plain, 180) < (least if bits < 8 else 0.98)
