"""Attention to what is read: against all of it, masked; and the ways to it against each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import recall, recall_cpu
from vlmprune.runtime.attention.recalled import Recalled
from vlmprune.select import recall as rule
from vlmprune.select.sketch import Sketch

SCALE = 0.1
KINDS = ("int2", "int4", "int8", "exact")


@dataclass
class Case:
    """A prompt's visual tokens, its text, and what asks."""

    query: Tensor
    keys: Tensor
    values: Tensor
    text_keys: Tensor
    text_values: Tensor
    mask: Tensor | None
    images: Tensor
    tokens: Tensor

    def recalled(self, read: int | float, kind: Any = "int4", **more: Any) -> Recalled:
        keep = rule.counts(read, self.tokens, 0)
        columns = torch.arange(self.images.shape[1]).expand_as(self.images)
        more = {"place": "device"} | more
        return Recalled.of(
            self.keys, self.values, self.images, columns, self.tokens, keep, kind, **more
        )

    @property
    def call(self) -> AttentionCall:
        text = self.text_keys, self.text_values, self.mask
        return AttentionCall(nn.Identity(), self.query, *text, {"scaling": SCALE})

    def masked(self, read: Tensor) -> Tensor:
        """Torch's attention to all keys, of which those of `read` [B, H, V] are seen."""
        group = self.query.shape[1] // self.keys.shape[1]
        batch, heads, length = *self.query.shape[:2], self.query.shape[2]
        seen = read.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, length, -1)
        text = torch.ones(batch, 1, 1, self.text_keys.shape[2], dtype=torch.bool)
        text = (text if self.mask is None else self.mask).expand(batch, heads, length, -1)
        keys, values = (
            torch.cat(pair, dim=2).float().repeat_interleave(group, dim=1)
            for pair in ((self.keys, self.text_keys), (self.values, self.text_values))
        )
        return functional.scaled_dot_product_attention(
            self.query.float(), keys, values, torch.cat((seen, text), dim=3), scale=SCALE
        )

    def to(self, dtype: torch.dtype) -> Case:
        names = ("query", "keys", "values", "text_keys", "text_values")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def make(
    lengths: list[list[int]],
    heads: int = 2,
    group: int = 2,
    width: int = 16,
    text: int = 5,
    masked: bool = False,
    queries: int = 1,
    seed: int = 0,
) -> Case:
    """Samples with images of these lengths, the last tokens of shorter ones being padding."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, longest, most = len(lengths), max(map(sum, lengths)), max(map(len, lengths))
    images = torch.full((batch, longest), -1)
    tokens = torch.zeros(batch, most, dtype=torch.long)
    for row, own in enumerate(lengths):
        tokens[row, : len(own)] = torch.tensor(own, dtype=torch.long)
        images[row, : sum(own)] = torch.arange(len(own)).repeat_interleave(tokens[row, : len(own)])
    mask = None
    if masked:
        mask = random(batch, 1, queries, text) > 0
        mask[..., 0] = True
    return Case(
        random(batch, heads * group, queries, width),
        random(batch, heads, longest, width) * 2,
        random(batch, heads, longest, width),
        random(batch, heads, text, width),
        random(batch, heads, text, width),
        mask,
        images,
        tokens,
    )


cases = st.builds(
    make,
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([1, 3, 16, 40]),
    masked=st.booleans(),
    seed=st.integers(0, 9999),
)


@given(cases, st.sampled_from([2, 4, 8]))
def test_scores_in_whole_numbers_are_those_of_the_sketch(case: Case, bits: int) -> None:
    """To float32's rounding: 24 bits of the largest value of a query, and of the largest sum."""
    sketch = Sketch.of(case.keys, case.images >= 0, bits)
    query = case.query[:, :, 0]
    wanted = sketch.scores(query, SCALE)
    got = recall_cpu.scores(sketch.signed(), query, SCALE)
    size = float(wanted.abs().max()) + float(query.abs().max())
    torch.testing.assert_close(got, wanted, atol=5e-6 * size, rtol=0)
    # A control: another query has others.
    if sketch.width > 8:
        other = recall_cpu.scores(sketch.signed(), query.flip(2), SCALE)
        assert not torch.allclose(other, wanted, atol=1e-2 * size, rtol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_outlier_leaves_other_channels_their_digits(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make([[200]], width=64)
    case.keys[..., 3] *= 1000
    sketch = Sketch.of(case.keys, case.images >= 0, bits).signed()
    query = case.query[:, :, 0]
    wanted = sketch.scores(query.double(), SCALE)
    error = (recall_cpu.scores(sketch, query, SCALE) - wanted).abs().max() / wanted.abs().max()
    assert error < 2e-6
    monkeypatch.setattr(recall_cpu, "_DIGITS", 1)
    coarse = (recall_cpu.scores(sketch, query, SCALE) - wanted).abs().max() / wanted.abs().max()
    assert coarse > 100 * error


@given(cases, st.sampled_from([1, 4, 0.1, 0.5]), st.sampled_from(KINDS))
def test_attention_is_that_to_what_was_read(case: Case, read: float, kind: str) -> None:
    recalled = case.recalled(read, kind)
    for backend in ("reference", "cpu"):
        out, what = recall.attend(case.call, recalled, backend=backend)
        taken = what.mask(recalled, case.keys.shape[1])
        torch.testing.assert_close(out, case.masked(taken), atol=1e-5, rtol=1e-5)
        counted = recalled.keep.sum(dim=1)[:, None].expand(taken.shape[:2])
        assert torch.equal(taken.sum(dim=2), counted)
        if not recalled.all_read and backend == "cpu":
            # What was read is what the rule chooses by these scores.
            beside = recall.ragged.dense_partial(
                case.query, case.text_keys, case.text_values, case.mask, SCALE
            )[1][:, :, 0]
            scores = recalled.scores(case.query[:, :, 0], SCALE)
            stand, _ = rule.standing(scores, recalled.real, case.keys.shape[1], beside)
            wanted = rule.chosen(stand, case.images, recalled.keep)
            # Scores that are alike but for rounding may change places.
            apart = (taken != wanted).sum()
            assert apart <= 0.02 * taken.numel() + 2


def test_other_tokens_make_another_output() -> None:
    case = make([[40], [25]])
    recalled = case.recalled(4)
    out, what = recall.attend(case.call, recalled)
    taken = what.mask(recalled, 2)
    assert torch.allclose(out, case.masked(taken), atol=1e-5)
    assert not torch.allclose(out, case.masked(taken.roll(1, dims=2)), atol=1e-2)
    assert not torch.allclose(out, case.masked(recalled.real[:, None].expand_as(taken)), atol=1e-2)


@given(cases, st.sampled_from(KINDS), st.sampled_from(("reference", "cpu")))
def test_what_reads_all_is_whole(case: Case, kind: str, backend: str) -> None:
    whole = case.masked((case.images >= 0)[:, None].expand(-1, case.keys.shape[1], -1))
    for recalled, told in ((case.recalled(1.0, kind), False), (case.recalled(1, kind), True)):
        out, what = recall.attend(case.call, recalled, whole=told, backend=backend)
        assert what.index is None
        torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-6)


def test_several_queries_read_all() -> None:
    case = make([[40], [25]], queries=3)
    out, what = recall.attend(case.call, case.recalled(4))
    assert what.index is None
    whole = (case.images >= 0)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(out, case.masked(whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(case=cases, read=st.sampled_from([1, 0.1, 0.5]))
def test_half_precision(dtype: torch.dtype, case: Case, read: float) -> None:
    half = case.to(dtype)
    recalled = half.recalled(read)
    out, what = recall.attend(half.call, recalled)
    assert out.dtype == dtype
    taken = what.mask(recalled, case.keys.shape[1])
    tolerance = 5e-2 if dtype == torch.bfloat16 else 8e-3
    torch.testing.assert_close(out.float(), half.masked(taken), atol=tolerance, rtol=tolerance)


def test_what_is_fetched_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make([[30, 9], [25]], heads=3, masked=True)
    recalled = case.recalled(0.3)
    want = recall.attend(case.call, recalled)[0]
    monkeypatch.setattr(recall_cpu, "_AT_ONCE", 1)
    torch.testing.assert_close(recall.attend(case.call, recalled)[0], want)


def test_keys_and_values_may_lie_in_a_file() -> None:
    case = make([[40], [25]])
    near, far = case.recalled(4), case.recalled(4, place="host")
    assert torch.equal(recall.attend(case.call, near)[0], recall.attend(case.call, far)[0])
    assert far.sketch is not None
    assert far.device_bytes == far.sketch.nbytes == near.device_bytes - near.store.nbytes
    assert far.host_bytes == near.store.nbytes and not near.host_bytes


def test_backends_have_names() -> None:
    case = make([[40]])
    recalled = case.recalled(4)
    assert recall.choose_backend(case.call, recalled) == "cpu"
    with pytest.raises(ValueError, match="one of reference, cpu, triton"):
        recall.attend(case.call, recalled, backend="fast")
    there = replace(recalled, store=replace(recalled.store, device=torch.device("meta")))
    assert recall.choose_backend(case.call, there) == "reference"
    with pytest.raises(ValueError, match="cpu needs tokens on the CPU, not on meta"):
        recall.choose_backend(case.call, there, "cpu")


def test_where_choosing_does_not_pay_all_is_read() -> None:
    case = make([[40], [25]])
    stays, aside = case.recalled(4), case.recalled(4, may_step_aside=True)
    assert not stays.aside and not stays.all_read
    # What was asked for is still told, though all is read.
    assert aside.aside and aside.all_read and torch.equal(aside.keep, stays.keep)
    assert aside.sketch is None and aside.device_bytes == aside.store.nbytes
    assert aside.bytes_read == aside.bytes_dense > stays.bytes_read
    out, what = recall.attend(case.call, aside)
    whole = (case.images >= 0)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(out, case.masked(whole), atol=1e-6, rtol=1e-6)
    assert what.index is None and aside.select(torch.tensor([1])).aside
    # Many tokens of many heads are chosen from.
    large = make([[600]] * 4, heads=32, group=1, width=64)
    large = replace(large, tokens=large.tokens)
    assert (
        not make([[1500]], heads=64, group=1, width=128).recalled(0.0625, may_step_aside=True).aside
    )
    assert large.recalled(0.9, may_step_aside=True).aside


def test_the_places_of_a_step_that_reads_everything() -> None:
    recalled = make([[3, 2], [2]]).recalled(2)
    every = [0, 1, 2, 3, 4], [0, 1, -1, -1, -1]
    assert recall.Read().places(recalled, 2).tolist() == [[one, one] for one in every]
