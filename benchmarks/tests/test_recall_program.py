"""The program that times a step that reads few tokens: what it checks, counts and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import program
import recall
from vlmprune import VlmpruneError

TINY = ["--case", "2x64x4x2", "--width", "16", "--text", "8", "--threads", "1", "--repeat", "1"]
CPU: Any = {"device": torch.device("cpu"), "dtype": torch.float32}


def run(*words: str) -> Any:
    environment = {"COLUMNS": "300", "TERM": "dumb"}
    return CliRunner().invoke(program.command(recall.main), words, env=environment)


def test_it_measures_attention_layer_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run(*TINY, "--layer", "32x48", "--device", "cpu", "--json", str(file))
    assert done.exit_code == 0, done.output
    for told in ("Time of the attention", "Time of the layer", "Bytes that a step reads"):
        assert told in done.output
    (one,) = json.loads(file.read_text())["results"]
    parts, ways = ("attention", "layer"), ("repeated", "floor", "int4")
    assert one["ratios"].keys() == {f"{part} {way}" for part in parts for way in ways}
    # 64 tokens in 2 heads of 2 samples: 16 channels of 4 bytes, of keys and of values.
    dense, text = 4 * 64 * 128, 4 * 8 * 128
    # Codes and a scale a token; of each channel a mean, a deviation and the sum of its values.
    sketch = 4 * (64 * (8 + 2) + 3 * 4 * 16)
    assert one["dense_bytes"] == dense + text
    assert one["read"]["int4"] == pytest.approx((dense / 16 + sketch + text) / (dense + text))
    assert one["aside"] == {"int4": True}


def test_what_is_read_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = recall.Case(recall.Shape.of("2x64x4x2"), 16, 8, 0.1, CPU)
    assert recall.check(case, case.recalled("int4", rest="none")) < 1e-5
    # Attention to other tokens than those that are told.
    index = recall.recall.Read.mask
    monkeypatch.setattr(recall.recall.Read, "mask", lambda *given: index(*given).roll(1, dims=2))
    with pytest.raises(VlmpruneError, match="differs by"):
        recall.check(case, case.recalled("int4", rest="none"))


def test_dense_is_torchs_own_attention() -> None:
    case = recall.Case(recall.Shape.of("2x64x4x2"), 16, 8, 0.1, CPU)
    wanted = case.repeated(case.query)
    torch.testing.assert_close(case.dense(case.full, case.query), wanted)
    assert not torch.allclose(case.dense(case.floor, case.query), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "4x2880"], "--case must be BATCHxTOKENSxHEADSxKV_HEADS"),
        (["--case", "4x2880x32x5"], "HEADS a multiple of KV_HEADS"),
        (["--case", "4x0x32x8"], "not '4x0x32x8'"),
        (["--sketch", "int3"], "--sketch must be one of int2, int4, int8, exact"),
        (["--read", "1.5"], "--read must lie within 0 and 1"),
        (["--layer", "4096"], "--layer must be HIDDENxINNER"),
        (["--repeat", "0"], "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
