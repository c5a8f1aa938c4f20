"""VLMEvalKit's launcher: what it attaches, what it tells, what it refuses.

The stand-in has what the launcher relies on: a run.py with `supported_VLM`, `main` and `load_env`,
whose main reads sys.argv, makes models by name and logs what goes wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from held_out_scenes import picture
from vlmprune.integrations import vlmevalkit

RUN = """
import functools, sys
from vlmprune import embedded

class Llava:
    def __init__(self, path, verbose=False):
        self.path, self.verbose = path, verbose
        self.model, self.processor = embedded.load()

class Api:
    def __init__(self):
        self.model = "a name"

supported_VLM = {"small": functools.partial(Llava, "here", verbose=False), "remote": Api}
made, order = {}, []

def load_env():
    order.append("env")

def main():
    order.append("main")
    argv = sys.argv[1:]
    supported_VLM[argv[argv.index("--model") + 1]]
    for maker in supported_VLM.values():
        if hasattr(maker, "keywords") and "verbose" in maker.keywords:
            maker.keywords["verbose"] = True
    for name in argv[argv.index("--model") + 1 : argv.index("--data")]:
        try:
            made[name] = supported_VLM[name]()
        except Exception as error:
            order.append(f"skipped {name}")

if __name__ == "__main__":
    raise SystemExit("the launcher starts main itself")
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = tmp_path / "run.py"
    path.write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    sys.modules.pop("vlmevalkit_run", None)


def test_the_launcher_attaches_the_pruner(kit: str) -> None:
    method = "vispruner:keep=64,important_ratio=0.75"
    rest = ["--", "--model", "small", "--data", "MME", "--verbose"]
    assert vlmevalkit.main(["--method", method, "--run", kit, *rest]) == 0
    run: Any = sys.modules["vlmevalkit_run"]
    new = "small_vispruner-keep-64-important_ratio-0.75"
    assert sys.argv[1:] == ["--model", new, "--data", "MME", "--verbose"]
    assert run.order == ["env", "main"]
    wrapper = run.made[new]
    assert (wrapper.path, wrapper.verbose) == ("here", True)
    inputs = wrapper.processor(
        text="USER: <image>\nhow many? ASSISTANT:", images=picture(0), return_tensors="pt"
    )
    wrapper.model.generate(**inputs, max_new_tokens=1)
    assert len(wrapper.vlmprune.report.kept[0]) == 64
    # The model as it is stays there under its own name.
    assert not hasattr(run.supported_VLM["small"](), "vlmprune")


def test_the_launcher_tells_what_the_kit_would_only_log(kit: str, capsys: Any) -> None:
    rest = ["--", "--model", "remote", "--data", "MME"]
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", kit, *rest]) == 2
    assert sys.modules["vlmevalkit_run"].order[-1].startswith("skipped remote_")
    assert "remote: VLMEvalKit's Api holds no model of Transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (["--model", "large", "--data", "MME"], "no model 'large'"),
        (["--data", "MME"], "no `--model NAME` follows"),
        (["--config", "a.json"], "--config is not supported"),
        (["--model", "small", "--use-vllm"], "--use-vllm is not supported"),
    ],
)
def test_the_launcher_refuses(kit: str, rest: list[str], said: str, capsys: Any) -> None:
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", kit, "--", *rest]) == 2
    assert said in capsys.readouterr().err


def test_the_launcher_needs_the_kit_and_a_method(tmp_path: Path, capsys: Any) -> None:
    rest = ["--", "--model", "small"]
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", "none.py", *rest]) == 2
    assert "'none.py' is no file" in capsys.readouterr().err
    assert vlmevalkit.main(["--method", "visprune", *rest]) == 2
    assert "'visprune' is unknown" in capsys.readouterr().err
    other = tmp_path / "run.py"
    other.write_text("")
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", str(other), *rest]) == 2
    assert "no supported_VLM" in capsys.readouterr().err
