"""The kernels that choose in one launch, against the plain rules and the authors' masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import choice_cases
from shell import in_a_process
from vlmprune.select import rules


def test_the_same_tokens_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    calls = "choice_cases.check('cpu', 8); choice_cases.check_golden('cpu')"
    in_a_process(f"import choice_cases; {calls}", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    in_a_process(
        "import choice_cases; choice_cases.check_compiled()", TRITON_CACHE_DIR=str(tmp_path)
    )


@pytest.mark.cuda
def test_the_same_tokens_on_a_gpu() -> None:
    pytest.importorskip("triton")
    choice_cases.check("cuda", 100)
    choice_cases.check_golden("cuda")


@pytest.mark.cuda
def test_few_launches_on_a_gpu() -> None:
    pytest.importorskip("triton")
    attention, features = choice_cases.crops(5, 576, 1024, 0, False)
    given = attention.cuda(), features.cuda()
    rules.vispruner(*given, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        rules.vispruner(*given, 64)
    # The product, the choice, and what makes the features unit vectors before them.
    assert sum(event.count for event in seen.key_averages()) <= 8


def test_a_processor_goes_the_plain_way() -> None:
    assert rules._kernels(torch.zeros(1, 4, 4)) is None


def test_what_the_kernels_leave_to_the_plain_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    choice_triton = pytest.importorskip("vlmprune.select.choice_triton")
    # As in the interpreter, where a CPU will do.
    monkeypatch.setattr(choice_triton.choice_kernels, "thin", None)
    assert choice_triton.fits(torch.empty(5, 576, 8))
    assert choice_triton.fits(torch.empty(1, choice_triton.LARGEST, 8))
    assert not choice_triton.fits(torch.empty(1, choice_triton.LARGEST + 1, 8))
    assert not choice_triton.fits(torch.empty(0, 0, 8))
    # Many crops' similarities would take too much memory at once, many steps too long.
    assert not choice_triton.fits(torch.empty(1000, 576, 8))
    assert not choice_triton.fits(torch.empty(1, 576, 8), steps=1 << 26)
