"""Rules that drop rows inside the language model, against plain Python and cases known by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plain import best, of_image, raters, recycled, unlike
from vlmprune.select import row_rules


def true(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


# Two samples: images of 9 and 6 tokens; one image of 11 and padding.
IMAGES = [[0] * 9 + [1] * 6, [0] * 11 + [-1] * 4]
COUNTS = torch.tensor([[9, 6], [11, 0]])


@pytest.mark.parametrize(
    ("rate", "n", "expected"),
    [
        (1.0, 7, 7),
        (0.5, 5, 3),  # half is rounded up
        (0.1, 25, 3),
        (0.1, 5, 1),
        (0.3, 5, 2),
        (0.7, 5, 4),
        (0.44, 100, 44),
        (0.01, 10, 1),  # one at least
        (1e-9, 3, 1),
        (0.5, 0, 0),  # none of none
        (300 / 576, 576, 300),
    ],
)
def test_share(rate: float, n: int, expected: int) -> None:
    assert row_rules.share(rate, torch.tensor([[n]])).tolist() == [[expected]]
    each = torch.tensor([[rate]], dtype=torch.float32)
    assert row_rules.share(each, torch.tensor([[n]])).tolist() == [[expected]]


@given(st.data())
def test_most_attended_by_its_definition(data: st.DataObject) -> None:
    # Few different scores, so that ties are common.
    scores = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=15, max_size=15), min_size=2))
    rows = [IMAGES[i % 2] for i in range(len(scores))]
    keep = [
        [data.draw(st.integers(0, len(of_image(row, image)))) for image in (0, 1)] for row in rows
    ]
    got = row_rules.most_attended(
        torch.tensor(scores).float(), torch.tensor(rows), torch.tensor(keep)
    )
    for row, images, asked, found in zip(scores, rows, keep, true(got), strict=True):
        chosen = [best(list(map(float, row)), of_image(images, i), asked[i]) for i in (0, 1)]
        assert found == sorted(chosen[0] + chosen[1])


def test_raters_by_hand() -> None:
    """Two visual tokens, four words; one word is not allowed, whatever it is like."""
    visual = [[1.0, 0.0], [0.0, 2.0]]
    words = [[2.0, 0.0], [0.0, 0.1], [0.0, 3.0], [9.0, 9.0]]
    expected = raters(visual, words[:3])
    assert expected == [True, False, True]
    # Padding of any size must not count.
    padded = [*visual, [-50.0, 0.0]]
    images = torch.tensor([[0, 0, -1]])
    allowed = torch.tensor([[True, True, True, False]])
    got = row_rules.text_raters(torch.tensor([padded]), images, torch.tensor([words]), allowed)
    assert got.tolist() == [[*expected, False]]
    # Control: the padding, taken for a token, would change the choice.
    seen = row_rules.text_raters(
        torch.tensor([padded]), torch.tensor([[0, 0, 0]]), torch.tensor([words]), allowed
    )
    assert seen.tolist() != got.tolist()


def test_all_words_rate_where_none_stands_out() -> None:
    visual, words = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    words[0] = words[0, 0]
    allowed = torch.tensor([[True] * 4 + [False] * 2, [True] + [False] * 5, [False] * 6])
    images = torch.zeros(3, 4, dtype=torch.long)
    got = row_rules.text_raters(visual, images, words, allowed)
    assert got.tolist() == allowed.tolist()


def test_two_clusters_by_hand() -> None:
    """31 dropped tokens: ten are recycled, which makes two clusters, here plain to see."""
    scores = torch.tensor([[float(i % 31) for i in range(35)]])
    scores[0, 31:] = 100  # kept
    dropped = torch.zeros(1, 35, dtype=torch.bool)
    dropped[0, :31] = True
    # The ten best are 21 to 30. Seven lie in a row, with the densest spot at its near end, and
    # three lie far off.
    near = [[0.0, 0.0], [0.0, 0.1], [0.0, 0.3], [0.0, 0.6], [0.0, 1.0], [0.0, 1.5], [0.0, 2.1]]
    far = [[9.0, 9.0], [9.0, 9.3], [9.0, 9.9]]
    states = torch.full((1, 35, 2), -7.0)
    states[0, 21:31] = torch.tensor(far[:1] + near + far[1:])
    images = torch.zeros(1, 35, dtype=torch.long)
    new, merged, into = row_rules.recycle(states, images, scores, dropped, 0.3, 1)
    rows = new[0, merged[0]].tolist()
    where = {tuple(round(x, 4) for x in new[0, i].tolist()): i for i in true(merged)[0]}
    there, here = (where[k] for k in sorted(where, reverse=True))
    expected = [-1] * 21 + [there] + [here] * 7 + [there] * 2 + [-1] * 4
    assert into[0].tolist() == expected
    assert sorted(rows) == [
        pytest.approx([0, sum(y for _, y in near) / 7]),
        pytest.approx([9, sum(y for _, y in far) / 3]),
    ]
    # All other rows are as they were, and only dropped tokens' rows are taken.
    assert torch.equal(new[~merged], states[~merged])
    assert not (merged & ~dropped).any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [0.3, 1.0])
def test_recycling_by_its_definition(seed: int, part: float) -> None:
    draw = random.Random(seed)
    sizes = [[70, 41], [123, 0], [1, 2], [0, 0]]
    width = max(map(sum, sizes))
    images = [[0] * a + [1] * b + [-1] * (width - a - b) for a, b in sizes]
    vectors = [[[draw.gauss(0, 1.5) for _ in range(6)] for _ in range(width)] for _ in sizes]
    scores = [[draw.random() for _ in range(width)] for _ in sizes]
    dropped = [[one >= 0 and draw.random() < 0.8 for one in row] for row in images]
    new, merged, into = row_rules.recycle(
        torch.tensor(vectors),
        torch.tensor(images),
        torch.tensor(scores),
        torch.tensor(dropped),
        part,
        2,
    )
    assert not (merged & ~torch.tensor(dropped)).any()
    assert torch.equal(new[~merged], torch.tensor(vectors)[~merged])
    for b, row in enumerate(images):
        expected = []
        for image in (0, 1):
            gone = [i for i in of_image(row, image) if dropped[b][i]]
            expected += recycled(vectors[b], scores[b], gone, part)
        got = new[b, merged[b]]
        assert len(got) == len(expected)
        # Each merged row is the mean of those that say that they went there.
        assert set(into[b].tolist()) - {-1} == set(true(merged[b : b + 1])[0])
        for place in true(merged[b : b + 1])[0]:
            members = torch.tensor(vectors[b])[into[b] == place]
            assert torch.allclose(new[b, place], members.mean(dim=0), atol=1e-5)
        if expected:
            assert torch.allclose(got, torch.tensor(expected), atol=1e-5)


def test_recycling_of_duplicates_and_half_precision() -> None:
    """Tokens that are all alike make centres of the lowest indices, and no number is lost."""
    states = torch.ones(1, 40, 4, dtype=torch.bfloat16)
    dropped = torch.ones(1, 40, dtype=torch.bool)
    images = torch.zeros(1, 40, dtype=torch.long)
    new, merged, _ = row_rules.recycle(states, images, torch.zeros(1, 40), dropped, 0.3, 1)
    assert true(merged) == [[0, 1]]
    assert new.dtype == torch.bfloat16 and torch.equal(new, states)
    # Far apart, densities underflow where they are not compared as logarithms.
    apart = torch.arange(40.0)[None, :, None].square() * 1000
    new, merged, _ = row_rules.recycle(apart, images, torch.arange(40.0)[None], dropped, 0.3, 1)
    assert merged.sum() == 2 and new.isfinite().all()
    assert len(set(new[merged].flatten().tolist())) == 2


def test_unlike_pivots_by_hand() -> None:
    """One pivot in the image and one word, among directions on a circle."""
    degrees = [0, 10, 90, 180, 265, 350]
    states = [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]
    norms = [9.0, 1, 1, 1, 1, 1]
    words, word_norms = [[1.0, 0.0], [0.0, 5.0]], [1.0, 2.0]
    args = (
        torch.tensor([states]),
        torch.zeros(1, 6, dtype=torch.long),
        torch.tensor([norms]),
        torch.tensor([words]),
        torch.tensor([word_norms]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    # Token 0 is the pivot and takes 180 degrees, of two 265 as well; the word, at 90 degrees, takes
    # 265, or 350 where that is gone.
    for keep, expected in ((1, [0]), (2, [0, 3]), (3, [0, 3, 4]), (4, [0, 3, 4, 5])):
        got = row_rules.unlike_pivots(*args, torch.tensor([[keep]]), 1, 1)
        assert true(got) == [expected]
    # Without the word the pivot takes all: 180, 265 and 90 degrees.
    got = row_rules.unlike_pivots(*args, torch.tensor([[4]]), 1, 0)
    assert true(got) == [[0, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_unlike_pivots_by_their_definition(seed: int) -> None:
    draw = random.Random(seed)
    # Of the second sample two words alone may be pivots, of the third none.
    allowed = [[True] * 7, [False, True, False, True, False, False, False], [False] * 7]
    rows = [*IMAGES, IMAGES[0]]
    vectors = [[[draw.gauss(0, 1) for _ in range(4)] for _ in range(15)] for _ in rows]
    norms = [[draw.random() for _ in range(15)] for _ in rows]
    words = [[[draw.gauss(0, 1) for _ in range(4)] for _ in range(7)] for _ in rows]
    word_norms = [[draw.random() for _ in range(7)] for _ in rows]
    keep = [
        [draw.randint(1, n) if n else 0 for n in counts] for counts in ((9, 6), (11, 0), (9, 6))
    ]
    got = row_rules.unlike_pivots(
        torch.tensor(vectors),
        torch.tensor(rows),
        torch.tensor(norms),
        torch.tensor(words),
        torch.tensor(word_norms),
        torch.tensor(allowed),
        torch.tensor(keep),
        4,
        4,
    )
    for b, images in enumerate(rows):
        expected = []
        for image in (0, 1):
            own = of_image(images, image)
            may = [i for i in range(7) if allowed[b][i]]
            chosen = unlike(
                [vectors[b][i] for i in own],
                [norms[b][i] for i in own],
                [words[b][i] for i in may],
                [word_norms[b][i] for i in may],
                keep[b][image],
            )
            expected += [own[i] for i in chosen]
        assert true(got[b : b + 1]) == [expected]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 6), st.integers(0, 6), st.data())
def test_unlike_pivots_keep_just_so_many(
    n: int, words: int, image_pivots: int, text_pivots: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, n))
    torch.manual_seed(n)
    # Few directions, so that cosines tie.
    states = torch.randint(0, 2, (2, n, 3)).float()
    got = row_rules.unlike_pivots(
        states,
        torch.zeros(2, n, dtype=torch.long),
        states.sum(dim=2),
        torch.randn(2, words, 3),
        torch.randn(2, words).abs(),
        torch.ones(2, words, dtype=torch.bool),
        torch.full((2, 1), keep),
        image_pivots,
        text_pivots,
    )
    assert got.sum(dim=1).tolist() == [keep, keep]


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whoever looked at one would fail."""
    images = torch.zeros(2, 30, dtype=torch.long, device="meta")
    states, scores = torch.empty(2, 30, 8, device="meta"), torch.empty(2, 30, device="meta")
    text, counts = torch.empty(2, 5, 8, device="meta"), torch.ones_like(images[:, :1])
    words = torch.ones(2, 5, dtype=torch.bool, device="meta")
    keep = row_rules.share(0.5, counts)
    kept = row_rules.most_attended(scores, images, keep)
    assert row_rules.text_raters(states, images, text, words).shape == (2, 5)
    assert row_rules.recycle(states, images, scores, ~kept, 0.3, 1)[0].shape == states.shape
    chosen = row_rules.unlike_pivots(states, images, scores, text, text[..., 0], words, keep, 4, 4)
    assert chosen.shape == kept.shape == (2, 30)
    with pytest.raises(RuntimeError):
        bool(chosen.any())


def test_autocast_rounds_no_choice() -> None:
    """Products of what the rules see are float32 under autocast too, where a plain one is not."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    visual, text = drawn(2, 40, 16), drawn(2, 300, 16)
    images = torch.zeros(2, 40, dtype=torch.long)
    everywhere = torch.ones(2, 300, dtype=torch.bool)
    keep, scores = torch.full((2, 1), 16), drawn(2, 40)
    dropped, norms = drawn(2, 40) > 0, drawn(2, 300)

    def choose() -> list[Tensor]:
        return [
            row_rules.text_raters(visual, images, text, everywhere),
            *row_rules.recycle(visual, images, scores, dropped, 0.5, 1),
            row_rules.unlike_pivots(visual, images, scores, text, norms, everywhere, keep, 4, 4),
        ]

    plain = choose()
    with torch.autocast("cpu", torch.bfloat16):
        assert (visual @ text.mT).dtype == torch.bfloat16
        again = choose()
    for one, other in zip(plain, again, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
