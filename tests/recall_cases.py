"""Visual tokens of which a step reads a few, and Triton's kernels against plain functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ragged_cases import close
from recall_plain import plain, summed
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged, recall
from vlmprune.runtime.attention.recall import Read
from vlmprune.runtime.attention.recalled import Recalled, Store
from vlmprune.select import recall as rule
from vlmprune.select.sketch import Sketch, packed

SCALE = 0.25


@dataclass
class Case:
    """Visual tokens, text and later tokens, and what asks."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    recalled: Recalled

    @property
    def call(self) -> AttentionCall:
        text = (self.keys, self.values, self.mask)
        return AttentionCall(nn.Identity(), self.query, *text, {"scaling": SCALE})

    def to(self, device: str, dtype: torch.dtype) -> Case:
        store = self.recalled.store
        keys, values = (x.to(device, dtype) for x in (store.keys, store.values))
        recalled = self.recalled.to(torch.device(device))
        total = None if recalled.total is None else summed(values, recalled.real)
        store = Store.of(keys, values, "device", torch.device(device))
        recalled = replace(recalled, store=store, total=total)
        mask = self.mask
        if mask is not None:
            mask = mask.to(device, None if mask.dtype == torch.bool else dtype)
        query, keys, values = (x.to(device, dtype) for x in (self.query, self.keys, self.values))
        return Case(query, keys, values, mask, recalled)

    def found(self) -> Tensor:
        """[B, H, V] float32; what the choice goes by."""
        sketch, heads = self.recalled.sketch, self.keys.shape[1]
        _, beside = ragged.dense_partial(
            self.query, self.keys, self.values, self.mask, SCALE, plain=True
        )
        scores = sketch.scores(self.query[:, :, 0], SCALE)
        if scores.shape[1] == heads:
            return scores
        return rule.weights(scores, self.recalled.real, heads, beside[:, :, 0])

    def plain(self, read: Tensor) -> Tensor:
        """What is wanted where `read` [B, H, V] is read."""
        return plain(self.call, self.recalled, read, self.recalled.total is not None)[:, :, None]


def make(
    images: tuple[tuple[int, ...], ...] = ((20, 9), (29,), (5, 5)),
    H: int = 2,  # noqa: N803
    group: int = 2,
    T: int = 5,  # noqa: N803
    dims: tuple[int, int] = (8, 8),
    bits: int = 2,
    mask: str = "none",
    read: float | int = 0.3,
    floor: int = 0,
    mixed: bool = False,
    kinds: int = 10**6,
    rest: str = "mean",
    seed: int = 0,
) -> Case:
    """Whole numbers and powers of two, of which scores come out exactly, by the kernel or not.

    Args:
        images: tokens of each image, by sample; padding behind, where `mixed` does not mix all.
        H: KV heads.
        group: query heads of each.
        T: text and later tokens.
        dims: channels of keys and of values.
        bits: of the sketch.
        mask: a name in `MASKS`.
        read: as in `Recall`.
        floor: likewise.
        mixed: whether the tokens of images and padding stand in any order.
        kinds: how many different sketches of a key there are; tokens of one kind tie.
        rest: as in `Recall`.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    B, V, D = len(images), max(map(sum, images)), dims[0]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    tokens = torch.tensor(
        [[*one, *[0] * (max(map(len, images)) - len(one))] for one in images], dtype=torch.int64
    )
    numbers = torch.full((B, V), -1)
    for b, one in enumerate(images):
        each = torch.tensor(one, dtype=torch.int64)
        numbers[b, : sum(one)] = torch.arange(len(one)).repeat_interleave(each)
        if mixed:
            numbers[b] = numbers[b, torch.randperm(V, generator=generator)]
    kind = whole(0, kinds - 1, B, H, V) if kinds < V else torch.arange(V).expand(B, H, V)
    codes = whole(0, 2**bits - 1, B, H, V, D).gather(2, kind[..., None].expand(-1, -1, -1, D))
    size = 2.0 ** -whole(0, 1, B, H, V).gather(2, kind)
    sketch = Sketch(
        packed(codes.to(torch.uint8), bits),
        (size * 2.0 ** (2 - bits)).to(torch.float16) * (numbers >= 0)[:, None],
        whole(-2, 2, B, H, D).float(),
        2.0 ** -whole(0, 2, B, H, D),
        bits,
    )
    keep = rule.counts(read, tokens, floor)
    masks = {
        "none": None,
        "bool": random(B, 1, 1, T) > 0,
        "bool, one sample": random(1, 1, 1, T) > 0,
        "added": random(B, 1, 1, T).masked_fill(random(B, 1, 1, T) > 1, -torch.inf),
    }
    store = Store.of(random(B, H, V, D), random(B, H, V, dims[1]), "device", torch.device("cpu"))
    columns = torch.arange(V).expand(B, V)
    total = summed(store.values, numbers >= 0) if rest == "mean" else None
    return Case(
        whole(-2, 2, B, H * group, 1, D).float(),
        # A view of a larger buffer, as a tail that grows is, and one with the heads inside.
        random(B, H, T + 5, D)[:, :, :T],
        random(B, T, H, dims[1]).transpose(1, 2),
        masks[mask],
        Recalled(store, sketch, numbers, columns, tokens, keep, total=total),
    )


MASKS = ("none", "bool", "bool, one sample", "added")
cases = st.builds(
    make,
    images=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3
    ).map(tuple),
    H=st.integers(1, 2),
    group=st.integers(1, 4),
    T=st.integers(0, 20),
    dims=st.sampled_from([(8, 8), (20, 20), (13, 6), (7, 24)]),
    bits=st.sampled_from([2, 4, 8]),
    mask=st.sampled_from(MASKS),
    read=st.sampled_from([0.1, 0.3, 0.8, 1, 7]),
    floor=st.sampled_from([0, 8]),
    mixed=st.booleans(),
    kinds=st.sampled_from([2, 5, 10**6]),
    rest=st.sampled_from(["none", "mean"]),
    seed=st.integers(0, 2**16),
)


def check(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """Choice and output of the kernels against plain functions; [B, H, V] of what was read."""
    from vlmprune.runtime.attention import recall_triton

    moved = case.to(device, dtype)
    recalled, heads = moved.recalled, moved.keys.shape[1]
    if recalled.all_read:
        assert not recall_triton.runs(moved.query, recalled, moved.mask)
        return recalled.real[:, None].expand(-1, heads, -1)
    assert recall_triton.runs(moved.query, recalled, moved.mask)
    by = torch.zeros(recalled.store.keys.shape[:3], device=device)
    out, index, seen = recall_triton.attend(
        moved.query, recalled, moved.keys, moved.values, moved.mask, SCALE, by
    )
    read = Read(index, seen).mask(recalled, heads)
    # Each token once, as many of each image as it may have, and those that stand highest.
    taken = index.numel() if seen is None else int(seen.sum()) * heads
    assert taken == int(read.sum()) == int(recalled.keep.sum()) * heads
    assert torch.equal(read, rule.chosen(by, recalled.images, recalled.keep))
    want = moved.found()
    if moved.query.shape[1] == heads:
        by = by * 0.6931471805599453
    there = recalled.real[:, None].expand_as(by)
    assert close(by[there], want[there])
    if dtype == torch.float32:
        assert torch.equal(read, rule.chosen(want, recalled.images, recalled.keep))
        assert close(out, recall.attend(moved.call, recalled, backend="reference")[0])
    assert out.dtype == dtype
    assert close(out, moved.plain(read), dtype)
    return read


def check_triton(device: str, dtypes: list[torch.dtype], examples: int) -> None:
    """Run in a process of its own where the interpreter stands in for a GPU."""
    from vlmprune.runtime.attention import ragged_triton, recall_triton

    # A failing example is not made smaller, which takes minutes in the interpreter.
    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(case=cases, dtype=st.sampled_from(dtypes))
    def any_case(case: Case, dtype: torch.dtype) -> None:
        check(case, dtype, device)

    any_case()
    # Each mask, number of bits, rest and type once, whatever chance brings.
    for number, (bits, mask) in enumerate(zip((2, 4, 8, 2), MASKS, strict=True)):
        rest = ("none", "mean")[number // 2]
        case = make(((9,), (5, 6)), bits=bits, mask=mask, rest=rest)
        check(case, dtypes[number % len(dtypes)], device)
    edges(device)
    # Many blocks of tokens, parts of text and programs for each image.
    recall_triton.UNPACKED, recall_triton.CHUNK, recall_triton.SHARE = 256, 16, 16
    recall_triton.processors, ragged_triton.STAGE = lambda _: 40, 2048
    any_case()
    case = make(((50, 20), (70,)), T=36, group=3, bits=4, read=0.5, mask="bool", seed=1)
    check(case, torch.float32, device)
    # One KV head will do for what compares whole answers.
    case = make(((50, 20),), H=1, T=36, group=3, bits=4, read=0.5, mask="bool", seed=1)
    controls(case, check(case, torch.float32, device), device)
    by_the_door(case.to(device, torch.float32))


def edges(device: str) -> None:
    """What chance may not bring: one token of text, ties of all, no image, signed bytes."""
    for case in (
        make(((37,),), T=1, group=4, kinds=1),
        # The last sample reads everything: nothing stands.
        make(((65,), (64,), (3,)), T=1, group=1, kinds=1, dims=(13, 6), floor=64),
        make(((40,), (25,)), group=1, read=0.9),
        make(((), (30, 4), (12,)), group=2, bits=8, dims=(5, 24), mixed=True),
        # A block of query heads that has no row left.
        make(((20, 3),), H=1, group=16),
    ):
        check(case, torch.float32, device)
    large(make(((100,),), H=1, T=1, read=0.8), device)
    # Ties go to the lower index.
    assert check(make(((37,),), kinds=1, read=5), torch.float32, device)[..., :5].all()
    signs(make(((20, 9),), H=1, bits=4).to(device, torch.float32))


def large(case: Case, device: str) -> None:
    """Values whose sum is no float16."""
    from vlmprune.runtime.attention import recall_triton

    store, size = case.recalled.store, 2.0**11
    store = replace(store, values=store.values.abs() * size)
    case = replace(case, recalled=replace(case.recalled, store=store)).to(device, torch.float16)
    assert (case.recalled.total > 65504).all()
    out, index, seen = recall_triton.attend(
        case.query, case.recalled, case.keys, case.values, case.mask, SCALE
    )
    want = case.plain(Read(index, seen).mask(case.recalled, 1))
    assert close(out.float() / size, want / size, torch.float16)


def signs(case: Case) -> None:
    """Bytes of the sketch may be signed, each 128 less."""
    from vlmprune.runtime.attention import recall_triton

    sketch = case.recalled.sketch
    other = sketch.codes.view(torch.uint8) ^ 128
    other = other if sketch.codes.dtype == torch.int8 else other.view(torch.int8)
    flipped = replace(sketch, codes=other)
    given = case.keys, case.values, case.mask, SCALE
    want = recall_triton.attend(case.query, case.recalled, *given)
    got = recall_triton.attend(case.query, replace(case.recalled, sketch=flipped), *given)
    assert all(map(torch.equal, got, want))


def controls(case: Case, read: Tensor, device: str) -> None:
    """What must differ, does: of another query, of other means, and with a token exchanged.

    So it does where nothing stands for what is not read, or another token than its mean.
    """
    from vlmprune.runtime.attention import recall_triton

    case = case.to(device, torch.float32)
    sketch = case.recalled.sketch
    others: list[Any] = [
        replace(case, query=-case.query),
        replace(case, recalled=replace(case.recalled, sketch=replace(sketch, mean=-sketch.mean))),
        replace(case, recalled=replace(case.recalled, keep=(case.recalled.keep - 1).clamp(min=0))),
    ]
    for other in others:
        assert not torch.equal(check(other, torch.float32, device), read)
    exchanged = read.clone()
    exchanged[0, 0, read[0, 0].int().argmax()] = False
    exchanged[0, 0, read[0, 0].int().argmin()] = True
    assert not close(case.plain(exchanged), case.plain(read))
    bare, turned = (
        replace(case, recalled=replace(case.recalled, total=total))
        for total in (None, -case.recalled.total)
    )
    assert torch.equal(check(bare, torch.float32, device), read)
    assert not close(bare.plain(read), case.plain(read))
    out, index, seen = recall_triton.attend(
        turned.query, turned.recalled, turned.keys, turned.values, turned.mask, SCALE
    )
    assert torch.equal(Read(index, seen).mask(turned.recalled, read.shape[1]), read)
    assert not close(out, case.plain(read))


def by_the_door(case: Case) -> None:
    """`recall.attend` goes by the kernels where it is asked to, and its answer is the same."""
    from vlmprune.runtime.attention import recall_triton

    asked = []
    runs, recall._triton_runs = recall._triton_runs, lambda *given: not asked.append(given)
    try:
        out, read = recall.attend(case.call, case.recalled, backend="triton")
        whole, everything = recall.attend(case.call, case.recalled, whole=True, backend="triton")
    finally:
        recall._triton_runs = runs
    assert len(asked) == 1 and recall._triton() is recall_triton
    mask = read.mask(case.recalled, case.keys.shape[1])
    assert torch.equal(mask, rule.chosen(case.found(), case.recalled.images, case.recalled.keep))
    assert close(out, case.plain(mask))
    assert everything.index is None and not close(whole, out)


def check_compiled() -> None:
    """The kernels' code for GPUs that need not be there, of the launches as they are."""
    from triton_compiled import Compiled
    from vlmprune.runtime.attention import recall_triton

    compiled = Compiled()
    case = make(((20, 9), (30,)), group=3, bits=4, dims=(16, 16), mask="bool")
    alone = make(((40,),), group=1, bits=2, dims=(20, 8), mask="added")
    bare = make(((40,),), group=2, bits=2, dims=(20, 8), rest="none")
    given = (
        (80, alone, torch.float32),
        (90, case, torch.bfloat16),
        (90, bare, torch.float16),
    )
    for capability, one, dtype in given:
        compiled.target(capability)
        moved = one.to("cpu", dtype)
        recall_triton.attend(
            moved.query, moved.recalled, moved.keys, moved.values, moved.mask, SCALE
        )
        compiled.check(capability, 2)
    assert len(compiled.made) == 2 * len(given)
