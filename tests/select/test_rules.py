"""Selection rules against the authors' masks, and against a plain one written from the paper."""

from __future__ import annotations

import random

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int, jaxtyped
from safetensors.torch import load_file
from torch import Tensor

from repository import ROOT
from vlmprune import select
from vlmprune.select import rules

GOLDEN = ROOT / "tests/golden/selection.safetensors"
SETTINGS = ((32, 0.5), (64, 0.5), (64, 0.75), (192, 0.5))


@jaxtyped(typechecker=beartype)
def vispruner(
    attention: Float[Tensor, "B N"], features: Float[Tensor, "B N C"], keep: int, ratio: float = 0.5
) -> Int[Tensor, "B {keep}"]:
    return select.vispruner(attention, features, keep, ratio)


@jaxtyped(typechecker=beartype)
def top_k(scores: Float[Tensor, "B N"], keep: int) -> Int[Tensor, "B {keep}"]:
    return select.top_k(scores, keep)


@jaxtyped(typechecker=beartype)
def as_mask(kept: Int[Tensor, "B T"], size: int) -> Bool[Tensor, "B {size}"]:
    return torch.zeros(len(kept), size, dtype=torch.bool).scatter(1, kept, True)


def thinned(tokens: list[int], similarity: list[list[float]], keep: int) -> list[int]:
    """VisPruner's rounds over one list, pair by pair."""
    while len(tokens) > keep:
        even = [tokens[i] for i in range(0, len(tokens), 2)]
        odd = [tokens[i] for i in range(1, len(tokens), 2)]
        drop = min(8, len(tokens) - keep, len(even))
        closest = {a: max(similarity[b][a] for b in odd) for a in even}
        tokens = sorted(even, key=lambda a: (-closest[a], a))[drop:] + odd
    return tokens


def plain_vispruner(
    attention: list[float], similarity: list[list[float]], keep: int, ratio: float
) -> list[int]:
    """METHODS' steps 2 to 5 for one crop, with ties to the lower index."""
    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    important = int(keep * ratio)
    rest = order[important:]
    if keep > important:
        rest = thinned(rest, similarity, keep - important)
        return sorted(order[:important] + rest)
    return sorted(order[:important])


def random_crops(crops: int, tokens: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(crops, tokens, generator=generator).softmax(dim=1)
    return attention, torch.randn(crops, tokens, channels, generator=generator)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize(("keep", "ratio"), SETTINGS)
def test_same_tokens_as_the_authors(golden: dict[str, Tensor], keep: int, ratio: float) -> None:
    attention = golden["cls_attention"].mean(dim=1)
    want = golden[f"vispruner.keep{keep}.important{ratio}"]
    assert torch.equal(as_mask(vispruner(attention, golden["features"], keep, ratio), 576), want)
    # Controls: another ratio, crops swapped, and rows read in reverse choose other tokens.
    other = vispruner(attention, golden["features"], keep, 0.25)
    assert not torch.equal(as_mask(other, 576), want)
    swapped = vispruner(attention, golden["features"].flip(0), keep, ratio)
    assert not torch.equal(as_mask(swapped, 576), want)
    backwards = vispruner(attention, golden["features"].flip(1), keep, ratio)
    assert not torch.equal(as_mask(backwards, 576), want)


@pytest.mark.parametrize(("keep", "ratio"), SETTINGS)
def test_plain_version_chooses_as_the_authors(
    golden: dict[str, Tensor], keep: int, ratio: float
) -> None:
    """The plain version, which judges random cases below, is itself held against the masks."""
    attention = golden["cls_attention"].mean(dim=1)
    similarity = select.cosine_similarity(golden["features"])
    mask = golden[f"vispruner.keep{keep}.important{ratio}"]
    got = plain_vispruner(attention[0].tolist(), similarity[0].tolist(), keep, ratio)
    assert got == mask[0].nonzero()[:, 0].tolist()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    """Signs as features, 4^n of them, so that no cosine is rounded however it is computed.

    Few channels make for many ties, many for almost none.
    """
    N = draw(st.integers(1, 40))
    keep = draw(st.integers(1, N))
    ratio = draw(st.one_of(st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.floats(0, 1)))
    B, C = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 16, 64, 256, 1024]))
    attention, features = random_crops(B, N, C, draw(st.integers(0, 2**31)))
    features = features.sign() * draw(st.sampled_from([0.5, 1.0, 4.0]))
    if draw(st.booleans()):
        attention = (attention * N).round() / N
    return attention, features, keep, ratio


def plain_batch(attention: Tensor, features: Tensor, keep: int, ratio: float) -> list[list[int]]:
    unit = features.double() / features.double().norm(dim=-1, keepdim=True)
    return [
        plain_vispruner(a.tolist(), (u @ u.T).tolist(), keep, ratio)
        for a, u in zip(attention, unit, strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_the_plain_version(case: tuple[Tensor, Tensor, int, float]) -> None:
    attention, features, keep, ratio = case
    got = vispruner(attention, features, keep, ratio)
    assert got.tolist() == plain_batch(attention, features, keep, ratio)


@pytest.mark.parametrize("channels", [2, 3, 7, 50])
@pytest.mark.parametrize(("tokens", "keep", "ratio"), [(40, 12, 0.5), (39, 9, 0.3), (70, 21, 0.0)])
def test_equals_the_plain_version_on_any_features(
    tokens: int, keep: int, ratio: float, channels: int
) -> None:
    attention, features = random_crops(3, tokens, channels, seed=0)
    got = vispruner(attention, features, keep, ratio)
    assert got.tolist() == plain_batch(attention, features, keep, ratio)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 37])
def test_similarity_is_that_of_all_pairs(tokens: int) -> None:
    _, features = random_crops(2, tokens, 6, seed=0)
    got = select.cosine_similarity(features)
    want = torch.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    mirrored = got.transpose(1, 2)
    off_diagonal = ~torch.eye(tokens, dtype=torch.bool)
    torch.testing.assert_close(got[:, off_diagonal], mirrored[:, off_diagonal], rtol=0, atol=1e-6)


def test_controls_of_the_plain_version() -> None:
    """It would notice a round of another size, a list in another order, ties to the higher."""
    attention, features = random_crops(1, 40, 8, seed=0)
    similarity = select.cosine_similarity(features)[0].tolist()
    got = vispruner(attention, features, 12)[0].tolist()
    order = attention[0].argsort(descending=True).tolist()
    assert got == sorted(order[:6] + thinned(order[6:], similarity, 6))
    assert got != sorted(order[:6] + thinned(order[6:][::-1], similarity, 6))
    one_at_a_time = order[6:]
    while len(one_at_a_time) > 6:
        one_at_a_time = thinned(one_at_a_time, similarity, len(one_at_a_time) - 1)
    assert got != sorted(order[:6] + one_at_a_time)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_properties(case: tuple[Tensor, Tensor, int, float]) -> None:
    attention, features, keep, ratio = case
    got = vispruner(attention, features, keep, ratio)
    assert got.dtype == torch.int64
    assert bool((got.diff(dim=1) > 0).all()), "ascending, hence unique"
    assert bool((got >= 0).all()) and bool((got < attention.shape[1]).all())
    important = select.count_important(keep, ratio)
    assert important == int(keep * ratio)
    mask = as_mask(got, attention.shape[1])
    assert bool(mask.gather(1, top_k(attention, important)).all())
    everything = vispruner(attention, features, attention.shape[1], ratio)
    assert everything.tolist() == [list(range(attention.shape[1]))] * len(attention)


@pytest.mark.parametrize(("tokens", "keep"), [(33, 5), (40, 12), (576, 64), (577, 65)])
def test_crops_do_not_touch_each_other(tokens: int, keep: int) -> None:
    attention, features = random_crops(5, tokens, 16, seed=tokens)
    together = vispruner(attention, features, keep)
    for b in range(5):
        alone = vispruner(attention[b : b + 1], features[b : b + 1], keep)
        assert torch.equal(together[b : b + 1], alone)
    # Control: the crops do differ.
    assert not torch.equal(together[0], together[1])


def test_the_same_tensors_come_out_unchanged() -> None:
    attention, features = random_crops(2, 40, 8, seed=4)
    before = attention.clone(), features.clone()
    vispruner(attention, features, 10)
    assert torch.equal(attention, before[0]) and torch.equal(features, before[1])


def test_no_crops_and_features_with_gradients() -> None:
    attention, features = random_crops(2, 40, 8, seed=5)
    want = vispruner(attention, features, 10)
    got = vispruner(attention.requires_grad_(), features.requires_grad_(), 10)
    assert torch.equal(got, want)
    assert vispruner(attention[:0], features[:0], 10).shape == (0, 10)


def test_ties_go_to_the_lower_index() -> None:
    """All alike: 4 by attention, then even places of the list go, lowest index first."""
    attention, features = torch.ones(1, 20), torch.ones(1, 20, 4)
    assert top_k(attention, 5).tolist() == [[0, 1, 2, 3, 4]]
    # List 4..19, 6 to drop: the even places hold 4, 6, …, 18, all tied.
    got = vispruner(attention, features, 14, 4.5 / 14)
    assert got.tolist() == [[0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18, 19]]
    similarity = [[1.0] * 20] * 20
    assert got[0].tolist() == plain_vispruner([1.0] * 20, similarity, 14, 4.5 / 14)
    # Control: where the first of them is unlike the rest, it stays.
    features[:, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert not torch.equal(vispruner(attention, features, 14, 4.5 / 14), got)


def test_zero_of_either_sign_is_one_tie() -> None:
    """Right angles give 0.0 or -0.0 by chance of rounding; neither may go before the other."""
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    attention = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    # Even places 0, 2, 4 are at right angles to 1 and 3: tied, so 0 goes.
    assert vispruner(attention, features, 4, 0.0).tolist() == [[1, 2, 3, 4]]


def test_tied_tokens_may_change_places() -> None:
    """Tokens that tie in all respects: the choice depends on places, not on who stands there."""
    shuffler = random.Random(0)
    attention, features = random_crops(1, 30, 4, seed=8)
    features = features.sign()  # so that every product is exact wherever it is computed
    features[:, 10:20] = features[:, 10:11]
    attention[:, 10:20] = attention[:, 10:11]
    want = vispruner(attention, features, 9)
    for _ in range(10):
        order = list(range(10, 20))
        shuffler.shuffle(order)
        moved = torch.tensor([*range(10), *order, *range(20, 30)])
        assert torch.equal(vispruner(attention[:, moved], features[:, moved], 9), want)
    assert torch.equal(vispruner(attention, features, 9), want)


def test_duplicates_go_before_unique_tokens() -> None:
    """Eight tokens of their own direction, and four copies among the even places."""
    features = torch.eye(12)[None].clone()
    attention = torch.linspace(2, 1, 12)[None]
    # The list is 0..11; even place 2k copies the odd place after it.
    for copy in (0, 4, 6, 10):
        features[0, copy] = features[0, copy + 1]
    assert vispruner(attention, features, 8, 0.0).tolist() == [[1, 2, 3, 5, 7, 8, 9, 11]]
    # With half by attention, 0..3 stay and 4, 6, 10 go, as 4..11 holds three copies.
    assert vispruner(attention, features, 9, 0.45).tolist() == [[0, 1, 2, 3, 5, 7, 8, 9, 11]]
    # Control: without copies others go.
    unique = vispruner(attention, torch.eye(12)[None], 8, 0.0)
    assert unique.tolist() != [[1, 2, 3, 5, 7, 8, 9, 11]]


def test_length_of_features_does_not_matter() -> None:
    attention, features = random_crops(1, 40, 8, seed=2)
    longer = features * (1 + torch.arange(40) % 4)[None, :, None].float().exp2()
    assert torch.equal(vispruner(attention, longer, 10), vispruner(attention, features, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    attention, features = random_crops(2, 37, 8, seed=1)
    attention, features = attention.to(dtype), features.to(dtype)
    got = vispruner(attention, features, 11)
    assert torch.equal(got, vispruner(attention.float(), features.float(), 11))
    assert torch.equal(top_k(attention, 11), top_k(attention.float(), 11))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_k(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    scores = torch.tensor([values, values[::-1]], dtype=torch.float32)
    assert top_k(scores, keep)[0].tolist() == sorted(order[:keep])
    assert torch.equal(top_k(scores, keep)[1:], top_k(scores[1:], keep))


def test_refusals() -> None:
    attention, features = random_crops(2, 10, 4, seed=0)
    for keep in (0, 11, -1):
        with pytest.raises(ValueError, match=f"keep={keep} is outside 1 to 10"):
            select.vispruner(attention, features, keep)
    with pytest.raises(ValueError, match="outside 0 to 10"):
        select.top_k(attention, 11)
    for ratio in (-0.1, 1.1, float("nan")):
        for keep in (4, 10):
            with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
                select.vispruner(attention, features, keep, ratio)
    with pytest.raises(ValueError, match=r"expected \[B, N\]"):
        select.vispruner(attention[0], features, 4)
    for wrong in (features[:, 1:], features[:1], features[..., 0]):
        with pytest.raises(ValueError, match="do not fit"):
            select.vispruner(attention, wrong, 4)


def test_kernels_are_given_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the choice is one product and one launch, which sees the pairs of every crop."""
    attention, features = torch.rand(2, 6), torch.randn(2, 6, 4)
    given: list[Tensor] = []

    class Kernels:
        @staticmethod
        def thin(scores: Tensor, similarity: Tensor, keep: int, *_: int) -> Tensor:
            given.extend((scores, similarity))
            return torch.zeros(len(scores), keep, dtype=torch.long)

    monkeypatch.setattr(rules, "_kernels", lambda *_: Kernels)
    rules.vispruner(attention, features, 3, 0.4)
    scores, similarity = given
    assert torch.equal(scores, attention) and similarity.shape == (2, 6, 6)
    for crop, found in zip(features, similarity, strict=True):
        cosines = torch.nn.functional.cosine_similarity(crop[:, None], crop[None], dim=2)
        assert torch.allclose(found, cosines, atol=1e-6)
