"""Caches of which each head keeps some, what asks them, and Triton's kernel against the plain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.ragged import Ragged

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """A dense cache of which some is kept, a tail, and what asks."""

    query: Tensor
    keys: Tensor
    values: Tensor
    keep: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    mask: Tensor | None
    scaling: float = 0.4

    def run(self, backend: str) -> Tensor:
        prefix = Ragged.cut(self.keys, self.values, self.keep)
        return ragged.attend(self.on_tail(), prefix, backend)

    def on_tail(self) -> AttentionCall:
        """What asks, on the tail."""
        tail = (self.tail_keys, self.tail_values, self.mask)
        return AttentionCall(nn.Identity(), self.query, *tail, {"scaling": self.scaling})

    def to(self, device: str, dtype: torch.dtype) -> Case:
        def move(tensor: Tensor | None) -> Any:
            if tensor is None or tensor.dtype == torch.bool:
                return tensor if tensor is None else tensor.to(device)
            return tensor.to(device, dtype)

        names = ("query", "keys", "values", "keep", "tail_keys", "tail_values", "mask")
        return Case(*(move(getattr(self, name)) for name in names))


def make(
    B: int = 2,  # noqa: N803
    H: int = 2,  # noqa: N803
    group: int = 2,
    L: int = 30,  # noqa: N803
    Q: int = 1,  # noqa: N803
    T: int = 3,  # noqa: N803
    dims: tuple[int, int] = (8, 8),
    mask: str = "none",
    share: float = 0.5,
    seed: int = 0,
) -> Case:
    """Lengths differ from head to head; now and then a head keeps nothing, or everything."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keep = torch.rand(B, H, L, generator=generator) < share
    odd = torch.rand(B, H, 1, generator=generator)
    keep = (keep & (odd > 0.15)) | (odd > 0.85)
    masks = {
        "none": None,
        "bool": random(B, 1, Q, T) > 0,
        "bool, one sample": random(1, 1, Q, T) > 0,
        "bool, per head": random(B, H * group, Q, T) > 0,
        "added": random(B, 1, Q, T).masked_fill(random(B, 1, Q, T) > 1, -torch.inf),
        "added, per head": random(1, H * group, Q, T),
    }
    return Case(
        random(B, H * group, Q, dims[0]),
        random(B, L, H, dims[0]).transpose(1, 2),
        random(B, H, L, dims[1]),
        keep,
        # A view of a larger buffer, as a tail that grows is, and one with the heads inside.
        random(B, H, T + 5, dims[0])[:, :, :T],
        random(B, T, H, dims[1]).transpose(1, 2),
        masks[mask],
    )


MASKS = ("none", "bool", "bool, one sample", "bool, per head", "added", "added, per head")
shapes = {
    "B": st.integers(1, 3),
    "H": st.integers(1, 3),
    "group": st.integers(1, 4),
    "L": st.integers(0, 40),
    "T": st.integers(0, 5),
    "dims": st.sampled_from([(8, 8), (20, 20), (16, 6), (4, 24)]),
    "mask": st.sampled_from(MASKS),
    "share": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "seed": st.integers(0, 2**16),
}
cases = st.builds(make, **shapes, Q=st.integers(1, 4))
DECODE_MASKS = (*MASKS[:3], "added")
decode_cases = st.builds(make, **shapes | {"mask": st.sampled_from(DECODE_MASKS)})


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    same = got.shape == want.shape and not bool(got.isnan().any())
    return same and torch.allclose(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=0)


def check_triton(device: str, dtypes: list[torch.dtype], examples: int) -> None:
    """Run in a process of its own where the interpreter stands in for a GPU."""
    from vlmprune.runtime.attention import ragged_triton

    # A failing example is not made smaller, which takes minutes in the interpreter.
    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(case=decode_cases, dtype=st.sampled_from(dtypes))
    def check(case: Case, dtype: torch.dtype) -> None:
        equal(case.to(device, dtype), dtype)

    def equal(case: Case, dtype: torch.dtype) -> None:
        assert close(case.run("triton"), case.run("reference"), dtype)

    check()
    # Each mask with each type, whatever chance brings.
    for mask, dtype in product(DECODE_MASKS, dtypes):
        equal(make(mask=mask).to(device, dtype), dtype)
    # Many chunks for each sequence.
    ragged_triton.CHUNK, ragged_triton.processors = 16, lambda _: 40
    check()
    # Many blocks for each chunk, and a control that must differ.
    ragged_triton.STAGE = 2048
    for ragged_triton.CHUNK in (40, 10**6):
        case = make(L=180, T=40, group=7, mask="bool").to(device, torch.float32)
        want = case.run("reference")
        assert close(case.run("triton"), want)
        exchange(case)
        assert not close(case.run("triton"), want)


def exchange(case: Case) -> None:
    """In the first head that can, keep one other token than before."""
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in case.keep.shape[:2])).tolist():
        kept = case.keep[b, h]
        if kept.any() and not kept.all():
            kept[kept.int().argmax()] = False
            kept[kept.int().argmin() if kept[0] else len(kept) - 1] = True
            return
    raise AssertionError("no head has a token to exchange")
