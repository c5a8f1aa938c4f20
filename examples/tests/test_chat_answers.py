"""What `examples/chat.py` answers, asked without a browser."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from repository import ROOT
from vlmprune import VisPruner, embedded
from vlmprune.io import models
from vlmprune.io.pictures import open_image
from vlmprune.study import one_question

gradio = pytest.importorskip("gradio", reason="Gradio is not installed; see `make test-serve`")

PICTURE = embedded.scenes() / "coffee.jpg"
QUESTION = "where is the cat?"


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(*embedded.load())


def asked(loaded: models.Loaded, method: str, keep: float) -> list[Any]:
    """Everything that is shown from the question on, one after the other."""
    import chat

    said = []
    for history, kept, told in chat.answering(loaded, method)(
        open_image(PICTURE), QUESTION, keep, []
    ):
        said.append((history[-1]["content"], kept, told))
    return said


@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_an_answer_is_given_from_what_the_slider_and_the_method_keep(
    loaded: models.Loaded, ratio: float
) -> None:
    picture = open_image(PICTURE)
    inputs = models.prepare(loaded, [picture], QUESTION)
    with torch.no_grad(), VisPruner(keep=0.125, important_ratio=ratio)(loaded.model) as handle:
        out = loaded.model.generate(**inputs, max_new_tokens=64)
    new = out[0, inputs["input_ids"].shape[1] :]
    (expected,) = one_question.draw(loaded, inputs, [picture], handle.report)

    *words, (answer, kept, told) = asked(loaded, f"vispruner:important_ratio={ratio}", 12.5)
    assert answer == loaded.processor.decode(new, skip_special_tokens=True)
    assert len(words) > 1 and words[0][0] != answer
    assert told == "32 of 256 visual tokens"
    assert np.array_equal(np.asarray(kept), np.asarray(expected))
    assert "generate" not in vars(loaded.model)
    # Other settings keep, and draw, something else.
    other = asked(loaded, f"vispruner:important_ratio={0.75 - ratio}", 12.5)[-1][1]
    assert not np.array_equal(np.asarray(kept), np.asarray(other))


@pytest.mark.parametrize("method", ["plphp", "vispruner:keep=64"])
def test_a_method_without_a_budget_for_the_slider_is_a_sentence(method: str) -> None:
    words = [sys.executable, str(ROOT / "examples" / "chat.py"), "--method", method]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"vlmprune: --method {method} leaves nothing to the slider")
    assert ran.stderr.count("\n") == 1
