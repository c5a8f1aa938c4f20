"""`vlmprune bench` as a user meets it. No time is asserted."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commandline import COFFEE, call, sentence
from vlmprune.io.outputs import maker
from vlmprune.study.bench import plot as benchplot
from vlmprune.study.bench import run as bench
from vlmprune.study.bench import shapes, tables, workload
from vlmprune.study.bench.results import BenchResult


def figures_of(content: dict[str, Any]) -> dict[str, Any]:
    """The only run."""
    (run,) = content["runs"]
    return dict(run)


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("bench") / "figures.json"
    result = call(
        *("bench", "--shape", "small", "--method", "vispruner:keep=64+plphp:r=0.5,dr=0"),
        *("--method", "plphp:r=0.5,dr=0", "--repeat", 1, "--new-tokens", 3, "--text-tokens", 9),
        *("--device", "cpu", "--json", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout), out


def test_bench_as_json(benched: tuple[dict[str, Any], Path]) -> None:
    everything, out = benched
    assert json.loads(out.read_text(encoding="utf-8")) == everything
    assert maker(out) == "vlmprune bench"
    assert everything["seconds_are"] == "of a CPU: use the ratios only"
    assert everything["attention"] == "sdpa"
    content = everything | figures_of(everything)
    assert content["model"] == "small shape, random weights"
    assert (content["batch"], content["images"], content["prompt_tokens"]) == (1, 1, 585)
    assert (content["new_tokens"], content["repeat"], content["dtype"]) == (3, 1, "float32")
    assert content["arguments"]["text_tokens"] == 9 and content["arguments"]["batch"] == []
    both, cut = content["methods"]
    assert both["name"] == "vispruner:keep=64+plphp:r=0.5,dr=0"
    assert (both["visual_tokens"], cut["visual_tokens"]) == (64, 576)
    # 8 layers, 4 KV heads of 64, four bytes.
    token = 2 * 8 * 4 * 64 * 4
    assert both["visual_kv_bytes"] == 32 * token
    assert cut["visual_kv_bytes"] == 288 * token
    assert content["all_tokens"]["cache_bytes"] == (585 + 2) * token
    # Kept positions and room for more tokens are stored as well.
    for one in (both, cut):
        held = one["cache_bytes"] - one["visual_kv_bytes"]
        assert 11 * token <= held < 60 * token
    assert cut["against_all_tokens"]["same_first_tokens"] == 1
    assert cut["against_all_tokens"]["visual_kv_ratio"] == 2
    for one in (both, cut):
        assert set(one["against_all_tokens"]) == {
            *("first_token_speedup", "prefill_speedup", "decode_speedup", "total_speedup"),
            *("selecting_share", "visual_kv_ratio", "visual_read_ratio"),
            *("cache_ratio", "peak_ratio", "flops_ratio"),
            "same_first_tokens",
        }
    assert [one["visual_tokens"] for one in content["floors"]] == [64, 32, 288]
    assert (both["floor"], both["decode_floor"]) == ("floor of 64 tokens", "floor of 32 tokens")
    assert (cut["floor"], cut["decode_floor"]) == ("all tokens", "floor of 288 tokens")
    assert content["no_floor"] == ""
    assert content["versions"]["torch"] == torch.__version__


def test_the_command_is_what_was_given(benched: tuple[dict[str, Any], Path]) -> None:
    content, out = benched
    words = shlex.split(content["command"])
    assert words[:2] == ["vlmprune", "bench"]
    pairs = {tuple(words[i : i + 2]) for i in range(2, len(words))}
    assert ("--method", "plphp:r=0.5,dr=0") in pairs and ("--text-tokens", "9") in pairs
    assert ("--out", str(out)) in pairs and "--json" in words
    assert "--batch" not in words


def test_one_method_as_a_table() -> None:
    options = ("--repeat", 2, "--new-tokens", 2, "--batch", 2, "--no-floor")
    result = call("bench", "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    # Ratios alone: on a CPU times say little.
    assert " ms" not in result.stdout and "tok/s" not in result.stdout
    assert "embedded model; 2 prompt(s) of 1 image(s)" in lines[0]
    rows = {line.split("  ")[0]: line for line in lines}
    assert "512" in rows["visual tokens"] and "-75 %  128" in rows["visual tokens"]
    for name in ("first token", "decode", "total"):
        assert rows[name].count("±") == 2 and rows[name].count("x ") == 1
    assert sum("  selecting" in line and "%" in line for line in lines) == 1
    assert "-75 %" in rows["visual KV"]
    assert "peak memory" not in rows and "x floor" not in rows
    assert rows["same first"].split()[2:] in ([str(n), "of", "2"] for n in range(3))
    assert "medians of 2 turn(s)" in result.stdout
    assert "peak memory is not measured on a CPU without --memory" in result.stdout


def test_several_batches_and_counts_of_tokens(tmp_path: Path) -> None:
    """A line and a picture for each; the model is made once."""
    page, plot, out = (tmp_path / f"b.{ending}" for ending in ("md", "png", "json"))
    result = call(
        *("bench", "--shape", "small-qwen", "--layers", 3, "--tower-layers", 1),
        *("--batch", 1, "--batch", 2, "--visual-tokens", 12, "--visual-tokens", 20),
        *("--method", "vispruner:keep=4", "--method", "fastv:keep=0.5", "--repeat", 1),
        *("--new-tokens", 2, "--device", "cpu", "--markdown", page, "--plot", plot, "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:-3])) <= 80
    content = json.loads(out.read_text(encoding="utf-8"))
    label = "small-qwen shape, random weights, 3 of 4 decoder and 1 of 4 vision layers"
    assert {run["model"] for run in content["runs"]} == {label}
    assert label in " ".join(result.stdout.split())
    found = [(run["batch"], run["all_tokens"]["visual_tokens"]) for run in content["runs"]]
    assert found == [(1, 12), (2, 24), (1, 20), (2, 40)]
    text = page.read_text(encoding="utf-8")
    assert label in text and content["command"] in text and "torch " in text
    assert "| vispruner:keep=4 |" in text and "| floor of 8 tokens |" in text
    assert " ms" not in text and "tok/s" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1
    # All tokens, two methods and two floors, below a heading of two lines.
    assert len(tables) == 4 * 7
    with Image.open(plot) as picture:
        assert picture.format == "PNG" and picture.info["Software"] == benchplot.MARK
        # Four rows of panels, each taller than an inch.
        assert picture.height > 4 * 150


def test_times_are_shown_of_a_gpu(benched: tuple[dict[str, Any], Path]) -> None:
    content = benched[0] | {"seconds_are": "measured on a GPU"}
    text = tables.markdown(content)
    assert " ms (" in text and " tok/s (" in text
    assert "what choosing takes" not in tables.markdown(content, with_legend=False)


def test_a_stopped_run_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "o.json", bench.compare

    def stopping(made: workload.Work, *rest: Any) -> BenchResult:
        if len(made.inputs["input_ids"]) == 2:
            raise KeyboardInterrupt
        return real(made, *rest)

    monkeypatch.setattr(bench, "compare", stopping)
    call(
        *("bench", "--shape", "small-qwen", "--layers", 1, "--visual-tokens", 9, "--batch", 1),
        *("--batch", 2, "--repeat", 1, "--new-tokens", 1, "--method", "vispruner:keep=4"),
        *("--device", "cpu", "--out", out),
    )
    (run,) = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert run["batch"] == 1


def test_several_methods_as_a_table(tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    result = call(
        *("bench", "--repeat", 1, "--new-tokens", 1, "--device", "cpu", "--images", COFFEE),
        *("--method", "vispruner:keep=64", "--method", "plphp", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert f"all figures are in {out}" in result.stdout
    lines = result.stdout.splitlines()[:-1]
    assert max(map(len, lines)) <= 80
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["plphp"][0] == "256"
    # Pruning after prefill spares it nothing.
    assert cells["plphp"][-1] == "="
    everything = json.loads(out.read_text(encoding="utf-8"))
    assert everything["arguments"]["images"] == [COFFEE]
    content = figures_of(everything)
    assert [one["visual_tokens"] for one in content["methods"]] == [64, 256]
    assert content["images"] == 1 and content["all_tokens"]["decode_tokens_per_second"] is None


MISTAKES = [
    ("--method magic", "method 'magic' is unknown"),
    ("--method plphp --method plphp", "--method plphp is given twice"),
    ("--shape huge", "shape 'huge' is unknown; use one of llava-1.5-7b"),
    ("--shape small --model ./x", "--shape and --model exclude each other"),
    ("--shape small --images 2 --visual-tokens 9", "--images and --visual-tokens exclude"),
    (f"--shape small --images {COFFEE}", "--shape makes its own pictures"),
    ("--shape small --visual-tokens 0", "--visual-tokens 0 is too few"),
    ("--shape small --text-tokens 0", "--text-tokens 0 is too few"),
    ("--visual-tokens 9", "--visual-tokens needs a --shape"),
    ("--layers 2", "--layers and --tower-layers need a --shape"),
    ("--shape small --layers 9", "--layers 9 is not from 1 to the 8 that shape 'small' has"),
    ("--shape small --tower-layers 1", "--tower-layers 1 is not from 2 to the 4"),
    ("--shape small-qwen --layers 0", "--layers 0 is not from 1 to the 4"),
    ("--images 0", "--images 0 is too few"),
    ("--images -1", "--images -1 is too few"),
    ("--images nowhere.jpg", "image 'nowhere.jpg' does not exist"),
    (f"--images 2 --images {COFFEE}", "image '2' does not exist"),
    ("--batch 0", "--batch 0 is too few"),
    ("--batch 2 --batch 0", "--batch 0 is too few"),
    ("--markdown table.txt", "--markdown 'table.txt' does not end in .md"),
    ("--plot plot.jpg", "--plot 'plot.jpg' does not end in .png"),
    ("--new-tokens 0", "--new-tokens 0 is too few"),
    ("--repeat 0", "--repeat 0 is too few"),
    ("--device abacus", "device 'abacus' is not available"),
    ("--dtype int8", "dtype 'int8' is unknown"),
    ("--model ./none", "model path './none' does not exist"),
    ("--model llava-1.5-7b", "an architecture for `vlmprune plan` and `bench --shape`"),
    ("--out figures.txt", "does not end in .json"),
    (f"--out {COFFEE}/o.json", "cannot be a folder, for it is a file; give another path"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda v: v.replace(COFFEE, "IMAGE"))
def test_mistakes_are_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("a model was made or loaded")

    monkeypatch.setattr(shapes, "build", worked)
    monkeypatch.setattr(workload, "load", worked)
    assert said in sentence("bench", "--device", "cpu", *shlex.split(words))


def test_a_shape_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_bytes", lambda device: shapes.GIB)
    said = sentence("bench", "--shape", "llava-next-13b", "--device", "cpu", "--batch", 4)
    assert "1.0 GiB are free" in said


def test_out_of_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(error: Exception) -> Any:
        def build(*_: Any) -> None:
            raise error

        return build

    asked = ("bench", "--shape", "small", "--device", "cpu")
    errors = (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    )
    for error in errors:
        monkeypatch.setattr(shapes, "build", full(error))
        assert "the memory of cpu is too small for this; use" in sentence(*asked)
    monkeypatch.setattr(shapes, "build", full(RuntimeError("another trouble")))
    assert isinstance(call(*asked).exception, RuntimeError)


def test_help_needs_no_torch() -> None:
    code = "import sys; from vlmprune.cli import main; sys.argv[1:] = ['bench', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--shape" in done.stdout
