"""`examples/serve_pruned.py` on loopback: streaming, four clients at once, and what goes wrong."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from repository import ROOT
from vlmprune import VisPruner, embedded
from vlmprune.io import models

# What `transformers serve` needs; the extra `serving` of Transformers brings them.
for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; see `make test-serve`")

SCRIPT = ROOT / "examples" / "serve_pruned.py"
KEEP, TOKENS = 8, 24
# Seconds until the server counts as dead; generous, since machines are slow and busy.
PATIENCE = 300.0
SCENES = json.loads((embedded.scenes() / "scenes.json").read_text(encoding="utf-8"))
ASKED = [(embedded.scenes() / scene["file"], "list all the cells.") for scene in SCENES[:4]]


def environment(spec: str) -> dict[str, str]:
    return os.environ | {"VLMPRUNE": spec, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(spec: str, log: Path | None = None) -> Iterator[str]:
    """A server with a pruner; gives its address. What it says goes into a file, if one is given."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(SCRIPT), str(embedded.path()), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    said = None if log is None else log.open("w", encoding="utf-8")
    process = subprocess.Popen(words, env=environment(spec), stderr=said)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not answer"
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)
        if said is not None:
            said.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """One that keeps few tokens of each picture."""
    with serving(f"vispruner:keep={KEEP}") as address:
        yield address


def request_of(picture: Path | None, question: str, stream: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if picture is not None:
        held = base64.b64encode(picture.read_bytes()).decode()
        url = {"url": f"data:image/jpeg;base64,{held}"}
        content.insert(0, {"type": "image_url", "image_url": url})
    return {
        "model": str(embedded.path()),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "stream": stream,
    }


def opened(address: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(asked, timeout=PATIENCE)


def events(answer: Any) -> Iterator[dict[str, Any]]:
    for line in answer:
        text = line.decode().strip()
        if text.startswith("data: ") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data: "))


def streamed(address: str, picture: Path | None, question: str) -> tuple[str, int]:
    """An answer that is streamed, and in how many pieces it came."""
    with opened(address, request_of(picture, question, True)) as answer:
        found = list(events(answer))
    assert not [one for one in found if "error" in one], found
    deltas = [one["choices"][0]["delta"].get("content") for one in found if one["choices"]]
    pieces = [one for one in deltas if one]
    return "".join(pieces).strip(), len(pieces)


def whole(address: str, picture: Path | None, question: str) -> dict[str, Any]:
    with opened(address, request_of(picture, question, False)) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


@pytest.fixture(scope="module")
def expected() -> dict[bool, list[str]]:
    """What the model answers to `ASKED` itself, pruned and whole."""
    loaded = models.Loaded(*embedded.load())

    def answer(picture: Path, question: str) -> str:
        with Image.open(picture) as image:
            inputs = models.prepare(loaded, [image.convert("RGB")], question)
        out = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        said: str = loaded.processor.decode(new, skip_special_tokens=True)
        return said.strip()

    with torch.no_grad():
        full = [answer(*one) for one in ASKED]
        with VisPruner(keep=KEEP)(loaded.model):
            return {False: full, True: [answer(*one) for one in ASKED]}


def test_four_clients_at_once_are_answered_by_the_pruned_model(
    server: str, expected: dict[bool, list[str]]
) -> None:
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda one: streamed(server, *one), ASKED))
    assert [text for text, _ in found] == expected[True]
    assert all(pieces > 1 for _, pieces in found)
    # With so few tokens the unpruned model says something else, about different pictures.
    assert expected[True] != expected[False] and len(set(expected[False])) == 4


def test_an_answer_at_once(server: str, expected: dict[bool, list[str]]) -> None:
    found = whole(server, *ASKED[0])
    assert found["choices"][0]["message"]["content"].strip() == expected[True][0]
    # The prompt is counted as the client gave it, with all its visual tokens.
    assert found["usage"]["prompt_tokens"] > 256


def test_a_client_that_leaves_harms_no_other(server: str, expected: dict[bool, list[str]]) -> None:
    with opened(server, request_of(*ASKED[1], True)) as answer:
        next(events(answer))
    assert streamed(server, *ASKED[2])[0] == expected[True][2]


def test_a_question_without_a_picture(server: str) -> None:
    assert whole(server, None, "hello?")["usage"]["completion_tokens"] > 0


def test_a_request_that_cannot_be_pruned_is_not_answered(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving("vispruner:keep=8,budget=frame", log) as address:
        with opened(address, request_of(*ASKED[0], True)) as answer:
            found = list(events(answer))
        assert "is for videos, and this request holds none" in found[-1]["error"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            whole(address, *ASKED[0])
        assert refused.value.code == 500
    said = log.read_text(encoding="utf-8")
    assert f"vlmprune: {embedded.path()} is pruned by vispruner:keep=8,budget=frame" in said
    assert "is for videos, and this request holds none" in said


def ended(model: Path, spec: str) -> str:
    """What a server that does not start says."""
    words = [sys.executable, str(SCRIPT), str(model), "--host", "127.0.0.1", "--port", "0"]
    ran = subprocess.run(
        words, env=environment(spec), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr.splitlines()[-1]


def test_what_stops_the_server_is_a_sentence(tmp_path: Path) -> None:
    said = ended(embedded.path(), "vispuner")
    assert said.startswith("vlmprune: ") and "did you mean 'vispruner'?" in said
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 99}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(embedded.path() / name, tmp_path)
    said = ended(tmp_path, "vispruner:keep=8")
    assert said.startswith("vlmprune: ") and "LlamaForCausalLM" in said
    said = ended(tmp_path / "nowhere", "vispruner:keep=8")
    assert said.startswith("transformers serve: ") and "nowhere" in said
