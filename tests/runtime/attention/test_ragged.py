"""Attention over a ragged cache: each backend against a plain one, and that against torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ragged_cases import Case, cases, check_triton, close, exchange, make
from repository import ROOT
from vlmprune.runtime.attention import ragged, ragged_varlen
from vlmprune.runtime.attention.ragged import Ragged


def masked_attention(case: Case) -> Tensor:
    """Torch's attention over the uncut cache, dropped tokens masked for each head."""
    (B, Hq, Q, _), L, T = case.query.shape, case.keys.shape[2], case.tail_keys.shape[2]
    group = Hq // case.keys.shape[1]
    added = torch.zeros(B, Hq, Q, L + T)
    kept = case.keep.repeat_interleave(group, dim=1)[:, :, None]
    added[..., :L].masked_fill_(~kept, -torch.inf)
    if case.mask is not None and case.mask.dtype == torch.bool:
        added[..., L:].masked_fill_(~case.mask, -torch.inf)
    elif case.mask is not None:
        added[..., L:] += case.mask
    keys = torch.cat((case.keys, case.tail_keys), dim=2).repeat_interleave(group, dim=1)
    values = torch.cat((case.values, case.tail_values), dim=2).repeat_interleave(group, dim=1)
    blind = (added == -torch.inf).all(dim=3, keepdim=True)
    if not L + T:
        return values.new_zeros(B, Hq, Q, values.shape[3])
    out = functional.scaled_dot_product_attention(
        case.query, keys, values, added.masked_fill(blind, 0.0), scale=case.scaling
    )
    return out.masked_fill(blind, 0.0)


@given(case=cases)
def test_reference_equals_masking_the_uncut_cache(case: Case) -> None:
    assert close(case.run("reference"), masked_attention(case))


@given(case=cases)
def test_cpu_equals_the_reference(case: Case) -> None:
    got = case.run("cpu")
    assert close(got, case.run("reference"))
    assert torch.equal(case.run("auto"), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(case=cases)
def test_cpu_in_half_precision(dtype: torch.dtype, case: Case) -> None:
    half = case.to("cpu", dtype)
    got = half.run("cpu")
    assert got.dtype == dtype
    assert close(got, half.run("reference"), dtype)


def varlen_stand_in(heads_first: bool) -> Any:
    """Keeps the contract of torch's function, and leaves rubbish where there are no keys."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
        out = torch.full_like(query, 7.0)
        lse = torch.full(query.shape[:2], torch.inf)
        factor = query.shape[2] ** -0.5 if scale is None else scale
        for i in range(len(cu_seq_q) - 1):
            mine, theirs = (slice(int(c[i]), int(c[i + 1])) for c in (cu_seq_q, cu_seq_k))
            if theirs.start < theirs.stop:
                k, v = (x[theirs].expand(-1, query.shape[1], -1) for x in (key, value))
                scores = torch.einsum("qhd,khd->qhk", query[mine], k) * factor
                out[mine] = torch.einsum("qhk,khd->qhd", scores.softmax(dim=2), v)
                lse[mine] = scores.logsumexp(dim=2)
        return out, lse.T if heads_first else lse

    return varlen_attn


@given(case=cases, heads_first=st.booleans())
def test_varlen_equals_the_reference(case: Case, heads_first: bool) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if case.keys.shape[3] != case.values.shape[3]:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", varlen_stand_in(heads_first))
        patch.setattr(ragged_varlen, "runs", lambda *_: True)
        got = case.run("varlen")
        assert torch.equal(case.run("auto"), got)
    assert close(got, case.run("reference"))


@pytest.mark.cuda
@settings(max_examples=50)
@given(case=cases)
def test_varlen_on_a_gpu(case: Case) -> None:
    half = case.to("cuda", torch.bfloat16)
    prefix = Ragged.cut(half.keys, half.values, half.keep)
    if ragged_varlen.runs(half.query, prefix):
        assert close(half.run("varlen"), half.run("reference"), torch.bfloat16)


def test_triton_equals_the_reference_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    # Transformers loads Triton, and the choice between GPU and interpreter is made on loading.
    call = "ragged_cases.check_triton('cpu', [torch.float32, torch.float16], 10)"
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, ragged_cases; {call}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
def test_triton_on_a_gpu() -> None:
    pytest.importorskip("triton")
    check_triton("cuda", [torch.float32, torch.float16, torch.bfloat16], 100)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_exchanging_one_token_shows(backend: str) -> None:
    case = make(seed=3)
    before = case.run("reference")
    assert close(case.run(backend), before)
    exchange(case)
    assert not close(case.run(backend), before)


@given(case=cases, at=st.integers(0, 5))
def test_parts_of_a_tail_merge_into_the_whole(case: Case, at: int) -> None:
    def part(start: int, stop: int | None) -> tuple[Tensor, Tensor]:
        mask = None if case.mask is None else case.mask[..., start:stop]
        keys, values = (x[:, :, start:stop] for x in (case.tail_keys, case.tail_values))
        return ragged.dense_partial(case.query, keys, values, mask, case.scaling)

    out, lse = ragged.merge(part(0, at), part(at, None))
    want_out, want_lse = part(0, None)
    assert close(out, want_out)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert close(lse.nan_to_num(neginf=0.0), want_lse.nan_to_num(neginf=0.0))
    assert not out[lse == -torch.inf].any()


@given(case=cases)
def test_partial_says_what_its_head_kept(case: Case) -> None:
    prefix = Ragged.cut(case.keys, case.values, case.keep)
    group = case.query.shape[1] // prefix.heads
    for backend in ("reference", "cpu"):
        out, lse = ragged.partial(case.query, prefix, case.scaling, backend)
        assert (out.dtype, lse.dtype, lse.shape) == (torch.float32, torch.float32, out.shape[:3])
        for b, h in torch.cartesian_prod(*(torch.arange(n) for n in lse.shape[:2])).tolist():
            kept = case.keep[b, h // group]
            scores = case.query[b, h] @ case.keys[b, h // group, kept].T * case.scaling
            assert torch.allclose(lse[b, h], scores.logsumexp(dim=1), atol=1e-5)
            want = scores.softmax(dim=1) @ case.values[b, h // group, kept]
            assert torch.allclose(out[b, h], want, atol=1e-5)


def tokens(cache: Ragged) -> list[list[list[Any]]]:
    """(column, key, value) of each token, by sample and head, read off one by one."""
    ends = cache.offsets.tolist()
    assert len(ends) == cache.batch * cache.heads + 1
    assert cache.lengths == tuple(b - a for a, b in pairwise(ends))
    assert (cache.columns.dtype, cache.offsets.dtype) == (torch.int32, torch.int32)
    assert len(cache.keys) == len(cache.values) == len(cache.columns) == ends[-1]
    held = (cache.keys, cache.values, cache.columns, cache.offsets)
    # Nothing larger is kept alive behind them.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
    assert cache.kv_bytes == held[0].nbytes + held[1].nbytes
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert cache.longest == max(cache.lengths, default=0)
    every = list(
        zip(cache.columns.tolist(), cache.keys.tolist(), cache.values.tolist(), strict=True)
    )
    heads = [every[a:b] for a, b in pairwise(ends)]
    return [heads[b * cache.heads : (b + 1) * cache.heads] for b in range(cache.batch)]


def kept_tokens(case: Case, offset: int = 0) -> list[list[list[Any]]]:
    B, H, L = case.keep.shape
    return [
        [
            [
                (i + offset, case.keys[b, h, i].tolist(), case.values[b, h, i].tolist())
                for i in range(L)
                if case.keep[b, h, i]
            ]
            for h in range(H)
        ]
        for b in range(B)
    ]


@settings(max_examples=50)
@given(case=cases, offset=st.integers(0, 9))
def test_cut_copies_what_is_kept(case: Case, offset: int) -> None:
    cache = Ragged.cut(case.keys, case.values, case.keep, offset=offset)
    assert tokens(cache) == kept_tokens(case, offset)
    moved = cache.to("cpu", non_blocking=True)
    assert tokens(moved) == tokens(cache)


@settings(max_examples=50)
@given(case=cases, seeds=st.lists(st.integers(0, 2**16), min_size=1, max_size=3))
def test_layers_are_cut_at_once_as_one_by_one(case: Case, seeds: list[int]) -> None:
    """Contiguous or not, with lengths that are known and without."""
    shape = case.keep.shape
    keep = [torch.rand(shape, generator=torch.Generator().manual_seed(one)) > 0.5 for one in seeds]
    keys = [case.keys + number for number in range(len(seeds))]
    values = [case.values.transpose(1, 2).contiguous().transpose(1, 2) - one for one in seeds]
    alone = [
        Ragged.cut(key, value, stays, offset=3)
        for key, value, stays in zip(keys, values, keep, strict=True)
    ]
    lengths = tuple(n for one in alone for n in one.lengths)
    for known in (None, lengths):
        together = Ragged.cut_each(keys, values, torch.cat(keep), offset=3, lengths=known)
        assert [tokens(one) for one in together] == [tokens(one) for one in alone]
    with pytest.raises(ValueError, match="Expected keys"):
        Ragged.cut_each(keys, values, torch.cat(keep).int())


@settings(max_examples=50)
@given(case=cases, seed=st.integers(0, 2**16))
def test_join_appends_to_each_head(case: Case, seed: int) -> None:
    first = Ragged.cut(case.keys, case.values, case.keep)
    keep = torch.rand(case.keep.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    second = Ragged.cut(case.keys, case.values, keep, offset=100)
    want = [
        [a + b for a, b in zip(*heads, strict=True)]
        for heads in zip(tokens(first), tokens(second), strict=True)
    ]
    assert tokens(first.join(second)) == want


@settings(max_examples=50)
@given(case=cases, data=st.data())
def test_select_takes_samples(case: Case, data: st.DataObject) -> None:
    cache = Ragged.cut(case.keys, case.values, case.keep)
    rows = data.draw(st.lists(st.integers(0, cache.batch - 1), max_size=5))
    got = cache.select(torch.tensor(rows, dtype=torch.int64))
    assert tokens(got) == [tokens(cache)[row] for row in rows]


@settings(max_examples=50)
@given(case=cases, column=st.integers(0, 45))
def test_before_crops(case: Case, column: int) -> None:
    cache = Ragged.cut(case.keys, case.values, case.keep)
    want = [[[t for t in head if t[0] < column] for head in heads] for heads in tokens(cache)]
    assert tokens(cache.before(column)) == want


@settings(max_examples=50)
@given(case=cases)
def test_dense_pads(case: Case) -> None:
    cache = Ragged.cut(case.keys, case.values, case.keep)
    keys, values, there = cache.dense()
    assert keys.shape[:3] == values.shape[:3] == there.shape
    assert there.shape == (cache.batch, cache.heads, cache.longest)
    for b, heads in enumerate(tokens(cache)):
        for h, head in enumerate(heads):
            assert there[b, h].tolist() == [i < len(head) for i in range(cache.longest)]
            assert keys[b, h, : len(head)].tolist() == [key for _, key, _ in head]
            assert values[b, h, : len(head)].tolist() == [value for _, _, value in head]
    assert not keys[~there].any()
    assert not values[~there].any()


def test_a_batch_of_none_and_a_query_of_none() -> None:
    for case in (make(B=0), make(Q=0), make(B=1, L=0, T=0)):
        for backend in ("reference", "cpu", "auto"):
            assert case.run(backend).shape == (*case.query.shape[:3], 8)
            assert not case.run(backend).any()


def test_tensors_made_in_inference_mode_serve_outside_it() -> None:
    case = make()
    with torch.inference_mode():
        prefix = Ragged.cut(case.keys, case.values, case.keep)
    with torch.no_grad():
        got = ragged.attend(case.on_tail(), prefix.join(prefix.before(0)))
    assert close(got, case.run("reference"))


def test_which_backend_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    prefix = Ragged.cut(case.keys, case.values, case.keep)
    assert ragged.choose_backend(case.query, prefix, None) == "cpu"
    assert not ragged_varlen.runs(case.query, prefix)
    able = {"triton": True, "varlen": True}
    monkeypatch.setattr(ragged, "_triton_runs", lambda *_: able["triton"])
    monkeypatch.setattr(ragged_varlen, "runs", lambda *_: able["varlen"])
    gpu: Any = SimpleNamespace(is_cuda=True)
    chosen = []
    for name in ("triton", "varlen", ""):
        chosen.append(ragged.choose_backend(gpu, prefix, None))
        able[name] = False
    assert chosen == ["triton", "varlen", "cpu"]
    assert set(chosen) < set(ragged.BACKENDS)


def test_what_the_kernels_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("vlmprune.runtime.attention.ragged_triton")
    # As in the interpreter, where a CPU will do.
    monkeypatch.setattr(kernels, "_split", None)

    def asked(changed: str = "", **sizes: Any) -> bool:
        case = make(B=1, H=1, L=4, **sizes)
        prefix = Ragged.cut(case.keys, case.values, case.keep)
        query, mask = case.query, torch.ones(1, 1, 1, 3, dtype=torch.bool)
        if changed == "a mask for each head":
            mask = mask.expand(1, 2, 1, 3)
        elif changed == "other values":
            prefix = replace(prefix, values=prefix.values.half())
        elif changed:
            kind = getattr(torch, changed)
            prefix = replace(prefix, keys=prefix.keys.to(kind), values=prefix.values.to(kind))
        return bool(kernels.runs(query, prefix, mask))

    assert asked() and asked(dims=(256, 8)) and asked(dims=(8, 256)) and asked("float16")
    assert not asked(dims=(257, 8)) and not asked(dims=(8, 257)) and not asked(Q=2)
    for changed in ("a mask for each head", "other values", "float64", "bfloat16"):
        assert not asked(changed), changed
    # A processor has no kernels.
    monkeypatch.undo()
    assert not asked()


def test_what_cannot_run_is_refused() -> None:
    case = make()
    prefix = Ragged.cut(case.keys, case.values, case.keep)
    for backend in ("triton", "varlen", "flash"):
        with pytest.raises(ValueError, match=backend):
            case.run(backend)
    with pytest.raises(ValueError, match="triton"):
        ragged.partial(case.query, prefix, 1.0, "triton")
    with pytest.raises(ValueError, match="does not fit"):
        ragged.partial(case.query[:1], prefix, 1.0)
    with pytest.raises(ValueError, match="Samples"):
        prefix.select(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="joined"):
        prefix.join(prefix.select(torch.tensor([1])))
    with pytest.raises(ValueError, match="Expected"):
        Ragged.cut(case.keys, case.values, case.keep.int())
    with pytest.raises(ValueError, match="Expected"):
        Ragged.cut(case.keys, case.values[:, :, 1:], case.keep)
