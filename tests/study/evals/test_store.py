"""A store holds what was answered, whatever becomes of the process, and of one model alone."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny import model, text_config
from vlmprune import VlmpruneError, embedded
from vlmprune.io.models import Loaded
from vlmprune.study.evals.run import evaluate
from vlmprune.study.tasks import Scenes


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*embedded.load())


def test_a_store_of_another_model_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """Of another class, another size, and the same in another precision."""
    store = tmp_path / "store.jsonl"
    evaluate(loaded, None, Scenes(), limit=1, store=str(store))
    before = store.read_bytes()
    deeper = model(text_config=text_config(num_hidden_layers=4))
    half = copy.deepcopy(loaded.model).to(torch.bfloat16)
    for other in (model(), model("llava_next"), deeper, half):
        with pytest.raises(VlmpruneError, match="is of another model"):
            evaluate(Loaded(other, loaded.processor), None, Scenes(), limit=1, store=str(store))
    assert store.read_bytes() == before


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from vlmprune import embedded
from vlmprune.io.models import Loaded
from vlmprune.study.evals.run import evaluate
from vlmprune.study.tasks import Scenes

def killed(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

loaded = Loaded(*embedded.load())
evaluate(loaded, None, Scenes(), limit=6, batch=3, store={store!r}, progress=killed)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills at once here")
def test_a_process_that_is_killed_has_written_what_it_answered(tmp_path: Path) -> None:
    """No buffer of its own is left that could be lost with it."""
    store = tmp_path / "store.jsonl"
    code = KILLED.format(paths=sys.path, store=str(store))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    head, *lines = [json.loads(line) for line in store.read_text().splitlines()]
    assert head["method"] == "unpruned"
    assert [one["id"] for one in lines] == [one.id for one in Scenes().samples(3)]
