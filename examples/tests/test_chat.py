"""`examples/chat.py` in a browser: a picture and a question go in, what was kept comes out."""

from __future__ import annotations

import io
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import browser
from vlmprune import VisPruner, embedded
from vlmprune.io import models
from vlmprune.io.pictures import open_image
from vlmprune.study import one_question

pytest.importorskip("gradio", reason="Gradio is not installed; see `make test-serve`")

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"no Chromium; install one, or name it by {browser.VARIABLE}"
)

PICTURE = embedded.scenes() / "coffee.jpg"
QUESTION = "what is in row three column one?"
PATIENCE = 120.0


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(*embedded.load())


@pytest.fixture(scope="module")
def address(loaded: models.Loaded) -> Iterator[str]:
    import chat

    built = chat.page(loaded, "embedded model", "vispruner")
    _, found, _ = built.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    yield found
    built.close()


@pytest.fixture
def shown(address: str, tmp_path: Path) -> Iterator[browser.Browser]:
    opened = browser.Browser(str(PROGRAM), tmp_path)
    opened.open(address)
    yield opened
    opened.close()


def waited(page: browser.Browser, expression: str) -> Any:
    """What an expression has once it is something."""
    end = time.monotonic() + PATIENCE
    while not (found := page.value(expression)):
        assert time.monotonic() < end, f"{expression} stays empty: {page.complaints}"
        time.sleep(0.1)
    return found


def upload(page: browser.Browser, picture: Path) -> None:
    waited(page, "!!document.querySelector('#picture input[type=file]')")
    root = page.ask("DOM.getDocument")["root"]["nodeId"]
    place = page.ask("DOM.querySelector", nodeId=root, selector="#picture input[type=file]")
    page.ask("DOM.setFileInputFiles", files=[str(picture)], nodeId=place["nodeId"])
    waited(page, "document.querySelector('#picture img')?.src")


def ask(page: browser.Browser, question: str) -> None:
    page.value("document.querySelector('#question textarea, #question input').focus()")
    page.ask("Input.insertText", text=question)
    page.press("Enter", 13, "\r")


def test_the_kept_tokens_stand_beside_the_answer(
    shown: browser.Browser, loaded: models.Loaded
) -> None:
    picture = open_image(PICTURE)
    inputs = models.prepare(loaded, [picture], QUESTION)
    with torch.no_grad(), VisPruner(keep=0.25)(loaded.model) as handle:
        out = loaded.model.generate(**inputs, max_new_tokens=256)
    new = out[0, inputs["input_ids"].shape[1] :]
    answer = loaded.processor.decode(new, skip_special_tokens=True).strip()
    (expected,) = one_question.draw(loaded, inputs, [picture], handle.report)

    upload(shown, PICTURE)
    ask(shown, QUESTION)
    source = waited(shown, "document.querySelector('#kept img')?.src")
    said = shown.value("document.querySelector('#chat').innerText")
    assert QUESTION in said and answer in said and answer
    told = "document.querySelector('#told textarea, #told input').value"
    assert waited(shown, told) == "64 of 256 visual tokens"
    with urllib.request.urlopen(source, timeout=PATIENCE) as given:
        drawn = Image.open(io.BytesIO(given.read())).convert("RGB")
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    # Nothing is kept of the model's once it has answered.
    assert "generate" not in vars(loaded.model)


def test_a_question_without_a_picture_is_told(shown: browser.Browser) -> None:
    waited(shown, "!!document.querySelector('#question textarea, #question input')")
    ask(shown, QUESTION)
    assert waited(shown, "document.body.innerText.includes('Give a picture and a question.')")
