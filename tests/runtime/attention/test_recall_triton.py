"""The kernels of a step that reads a few visual tokens, against plain functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recall_cases import check_triton, make
from shell import in_a_process
from vlmprune.runtime.attention import recall
from vlmprune.runtime.attention.recalled import Store


def test_the_kernels_equal_plain_functions_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    call = "recall_cases.check_triton('cpu', [torch.float32, torch.float16], 6)"
    in_a_process(f"import torch, recall_cases; {call}", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    in_a_process(
        "import torch, recall_cases; recall_cases.check_compiled()", TRITON_CACHE_DIR=str(tmp_path)
    )


@pytest.mark.cuda
def test_the_kernels_on_a_gpu() -> None:
    pytest.importorskip("triton")
    check_triton("cuda", [torch.float32, torch.float16, torch.bfloat16], 100)


def test_the_processor_goes_the_plain_way() -> None:
    case = make()
    assert not recall._triton_runs(case.call, case.recalled)


def test_what_the_kernels_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    recall_triton = pytest.importorskip("vlmprune.runtime.attention.recall_triton")
    # As in the interpreter, where a CPU will do.
    monkeypatch.setattr(recall_triton.recall_kernels, "look", None)
    case = make(mask="bool")
    recalled, query, mask = case.recalled, case.query, case.mask
    assert recall_triton.runs(query, recalled, mask)
    hosted = Store.of(recalled.store.keys, recalled.store.values, "host", torch.device("cpu"))
    strided = replace(recalled.store, keys=recalled.store.keys.mT.contiguous().mT)
    refused = {
        "two queries": (query.repeat(1, 1, 2, 1), recalled, mask),
        "a mask for each head": (query, recalled, mask.repeat(1, 4, 1, 1)),
        "keys on the host": (query, replace(recalled, store=hosted), mask),
        "keys out of order": (query, replace(recalled, store=strided), mask),
        "no sketch": (query, replace(recalled, sketch=None), mask),
        "all read": (query, replace(recalled, keep=recalled.tokens), mask),
        "wide heads": (query.repeat(1, 1, 1, 40), recalled, mask),
        "bfloat16, which the interpreter cannot": (
            query,
            case.to("cpu", torch.bfloat16).recalled,
            mask,
        ),
    }
    assert [name for name, given in refused.items() if recall_triton.runs(*given)] == []
    monkeypatch.setattr(recall_triton, "LARGEST", 20)
    assert recall_triton.runs(*given(20)) and not recall_triton.runs(*given(21))


def given(tokens: int) -> tuple[object, ...]:
    """What `runs` is asked, with an image of some tokens."""
    case = make(((tokens,),))
    return case.query, case.recalled, case.mask
