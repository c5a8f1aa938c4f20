"""`benchmarks/serve.py` without vLLM: its load, its sums, its page, and its checkpoint."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import program
import serve
import serve_load
import serve_page
import serve_server
from repository import ROOT
from shell import STUB, needs_shell
from vlmprune.study.bench import shapes

app = program.command(serve.main)


def test_arrivals_are_a_poisson_process_by_seed() -> None:
    times = serve_load.arrivals(4.0, 4000, 1)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0 and min(gaps) > 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.05)
    # Exponential gaps spread as widely as their mean; evenly spaced ones not at all.
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.1)
    assert serve_load.arrivals(4.0, 4000, 1) == times != serve_load.arrivals(4.0, 4000, 2)
    # Twice the load is the same pattern in half the time.
    assert serve_load.arrivals(8.0, 4000, 1) == pytest.approx([t / 2 for t in times])


def test_requests_hold_pictures_of_their_own() -> None:
    made = [json.loads(one) for one in serve_load.bodies("m", [7, 8, 7], 1, 5, 9, 32)]
    urls = [one["messages"][0]["content"][0]["image_url"]["url"] for one in made]
    assert urls[0] == urls[2] != urls[1]
    image = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
    assert image.size == (640, 480) and image.format == "JPEG"
    texts = [one["messages"][0]["content"][1]["text"] for one in made]
    assert len({*texts}) == 3 and {len(text.split()) for text in texts} == {5}
    for one in made:
        assert one["max_tokens"] == one["min_tokens"] == 9 and one["ignore_eos"]
        assert one["mm_processor_kwargs"] == {"vlmprune_keep": 32}
    assert b"mm_processor" not in serve_load.bodies("m", [7], 1, 5, 9, None)[0]


def test_a_streamed_answer_is_read() -> None:
    answer = serve_load.Answer(due=0.0)
    lines = [
        'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        'data: {"choices": [{"delta": {"content": "a"}}]}',
        "",
        # A piece without text is a token nevertheless.
        'data: {"choices": [{"delta": {"content": ""}}]}',
        'data: {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 2}}',
        "data: [DONE]",
    ]
    for at, line in enumerate(lines):
        serve_load.note(answer, line, float(at))
    assert answer.times == [1.0, 3.0] and (answer.prompt, answer.tokens) == (40, 2)
    assert not answer.error
    serve_load.note(answer, 'data: {"error": {"message": "no room"}}', 9.0)
    assert "no room" in answer.error


METRICS = """# HELP vllm:kv_cache_usage_perc …
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:cache_config_info{block_size="32",skip="[\\"a,b\\"]",num_gpu_blocks="96"} 1.0
process_cpu_seconds_total 1e-05
"""


def test_metrics_are_read() -> None:
    values, info = serve_load.read(METRICS)
    assert values[serve_load.USAGE] == 0.375 and values[serve_load.RUNNING] == 7
    assert values["process_cpu_seconds_total"] == 1e-05
    assert info["block_size"] == "32" and info["num_gpu_blocks"] == "96"


def test_means_over_time_and_quantiles() -> None:
    looks = [(0.0, {"x": 1.0}), (1.0, {"x": 4.0}), (4.0, {"x": 9.0})]
    # One second of 1, three of 4; the last look has no time of its own.
    assert serve_load.over_time(looks, "x") == {"mean": 13 / 4, "peak": 9.0}
    assert serve_load.over_time(looks[:1], "x") == {"mean": 1.0, "peak": 1.0}
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert serve_load.quantiles(values, 0, 50, 95) == {"p0": 1, "p50": 3, "p95": 4.8}
    assert math.isnan(serve_load.quantiles([], 50)["p50"])


def test_what_answers_add_up_to() -> None:
    def answer(due: float, *times: float, error: str = "") -> serve_load.Answer:
        return serve_load.Answer(due, due + 0.5, list(times), 100, len(times), error)

    told = serve_load.figures([answer(10, 12, 13, 15), answer(11, 15, 20), answer(1, error="no")])
    assert (told["requests"], told["errors"], told["error"]) == (3, 1, "no")
    assert told["seconds"] == 10 and told["requests_per_second"] == 0.2
    assert told["output_tokens_per_second"] == 0.5 and told["prompt_tokens"] == 100
    # From when it was due: 2 and 4 seconds. Gaps: 1, 2 and 5.
    assert told["first_token"] == {"p50": 3, "p95": pytest.approx(3.9)}
    assert told["between_tokens"] == {"p50": 2, "p95": pytest.approx(4.7)}
    assert told["whole_answer"] == {"p50": 7} and told["sent_late"] == 0.5
    assert serve_load.figures([answer(1, error="no")]) == {
        "requests": 1,
        "errors": 1,
        "error": "no",
    }


class Fake(BaseHTTPRequestHandler):
    """A server that answers as vLLM does: 50 tokens of prompt, of which 16 are visual."""

    busy, most, lock = 0, 0, threading.Lock()

    def do_GET(self) -> None:
        bodies = {
            "/health": "",
            "/metrics": METRICS,
            "/v1/models": json.dumps({"data": [{"id": "m"}]}),
        }
        self.reply(200, bodies[self.path].encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        keep = asked.get("mm_processor_kwargs", {}).get("vlmprune_keep", "all")
        if keep == 13:
            self.reply(400, b'{"error": {"message": "13 is unlucky"}}')
            return
        with self.lock:
            Fake.busy += 1
            Fake.most = max(Fake.most, Fake.busy)
        pieces = [{"choices": [{"delta": {"content": "w"}}]}] * asked["max_tokens"]
        usage = {"prompt_tokens": 34 + (16 if keep == "all" else keep)}
        usage["completion_tokens"] = asked["max_tokens"]
        made = [*pieces, {"choices": [], "usage": usage}]
        with self.lock:
            Fake.busy -= 1
        self.reply(200, b"".join(f"data: {json.dumps(one)}\n\n".encode() for one in made))

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_loads_of_a_server(url: str) -> None:
    httpx = serve_load.http()
    order: list[float] = []

    async def loads() -> tuple[list[Any], list[Any], list[Any]]:
        async with httpx.AsyncClient(base_url=url) as client:
            bodies = serve_load.bodies("m", [1, 2, 3], 1, 5, 4, 8)
            wrong = serve_load.bodies("m", [1], 1, 5, 4, 13)
            closed = await serve_load.closed_load(client, bodies, 2)
            opened = await serve_load.open_load(client, bodies, [0.3, 0.0, 0.2])
            order.extend(one.sent for one in opened)
            return closed, opened, await serve_load.closed_load(client, wrong, 1)

    closed, opened, wrong = asyncio.run(loads())
    for one in (*closed, *opened):
        assert (one.prompt, one.tokens, len(one.times), one.error) == (42, 4, 4, "")
    # Each is sent at its time, not in the order given, and not before.
    assert order[1] < order[2] < order[0]
    assert all(one.sent >= one.due for one in opened)
    assert opened[0].due - opened[1].due == pytest.approx(0.3)
    assert "13 is unlucky" in wrong[0].error and "400" in wrong[0].error


def test_the_command_measures_a_running_server(url: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ["--url", url, "--keep", "8", "--keep", "4", "--open-keep", "4", "--load", "0.5"]
    words += ["--requests", "4", "--clients", "2", "--arriving", "3", "--tokens", "3"]
    words += ["--rounds", "2", "--json", str(file)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "5000"})
    assert done.exit_code == 0, done.output
    told = json.loads(file.read_text())
    assert {name: one["prompt_tokens"] for name, one in told["cases"].items()} == {
        "all": 50,
        "8": 42,
        "4": 38,
    }
    assert len(told["rounds"]) == 2
    for one in told["rounds"]:
        assert {load: list(cases) for load, cases in one.items()} == {
            "closed": ["all", "8", "4"],
            "cached": ["all", "8", "4"],
            "open 0.5": ["all", "4"],
        }
        for load, cases in one.items():
            for figures in cases.values():
                assert figures["requests"] == (3 if load == "open 0.5" else 4)
                assert figures["errors"] == 0 and figures["output_tokens"] == 3
                assert figures["in_use"]["blocks"] == {"mean": 36.0, "peak": 36.0}
    # The same arrivals for all cases, others in another round.
    rates = {one["open 0.5"][name]["rate"] for one in told["rounds"] for name in ("all", "4")}
    assert len(rates) == 1
    assert serve_page.section(told) in done.output


def test_a_failing_request_stops_it(url: str) -> None:
    words = ["--url", url, "--keep", "13", "--requests", "1", "--clients", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "a request of case '13' failed: 400" in " ".join(done.output.split())


def test_the_command_is_told_without_paths() -> None:
    words = ["--keep", "64", "--json", "a/b.json", "--folder", "c", "--load", "0.5"]
    assert serve.without_paths(words) == ["--keep", "64", "--load", "0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "huge"], "--shape must be one of"),
        (["--shape", "tiny", "--model", "x"], "choose one"),
        (["--shape", "tiny", "--url", "http://x"], "with --url give --model"),
        (["--keep", "64", "--open-keep", "32"], "must be among the budgets [64]"),
        (["--url", "http://127.0.0.1:9"], "no OpenAI-compatible server answers"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code
    assert message in " ".join(done.output.split())


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve_server.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(app, ["--shape", "tiny"], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "vllm is not installed here" in done.output


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    stub = tmp_path / "vllm"
    stub.write_text("#!/bin/sh\necho VLMPRUNE=$VLMPRUNE $@\nexit 3\n")
    stub.chmod(0o755)
    for method in ("vispruner:keep=4", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve_server, "vllm", lambda: str(stub))
            patch.setenv("VLMPRUNE", "of the caller")
            server = serve_server.Server("m", method, ["--some"], tmp_path / "log")
            with pytest.raises(serve_server.VlmpruneError, match="ended before it answered"):
                server.wait()
            server.stop()
        said = server.tail()
        assert f"VLMPRUNE={method or ''} serve m --some" in said
        assert ("--trust-request-mm-kwargs" in said) == (method is not None)


def test_processor_time_is_of_the_session_alone() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    code = "sum(range(10**6)); print('done', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"done\n"
        found = serve_server.processor_seconds(child.pid)
        assert len(found) == 1 and sum(found.values()) > 0
    finally:
        child.communicate(b"\n")
    assert serve_server.processor_seconds(child.pid) == {}


def test_a_checkpoint_is_one_of_llava(tmp_path: Path) -> None:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    serve_server.checkpoint("tiny", tmp_path)
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    size = sum(one.numel() for one in model.parameters())
    assert size == shapes.parameters(serve_server.config_of("tiny"))
    processor = AutoProcessor.from_pretrained(tmp_path)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w3 w9"}]}
    text = processor.apply_chat_template([message])
    inputs = processor(images=Image.new("RGB", (64, 48)), text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words.count("<image>") == 16 and words[-2:] == ["w3", "w9"]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape and logits.isfinite().all()
    # Different tokens have different logits: it is not a model of zeros.
    assert logits[0, -1].std() > 1e-3
    # A folder that has the weights is left alone.
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    serve_server.checkpoint("tiny", tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_the_default_shape_has_half_a_billion_parameters() -> None:
    config = serve_server.config_of("llava-0.7b")
    assert 0.5e9 < shapes.parameters(config) < 1e9
    side = config.vision_config.image_size // config.vision_config.patch_size
    assert side**2 == 576


@needs_shell
@pytest.mark.parametrize("small", ["1", ""])
def test_the_gpu_script_serves_on_demand(tmp_path: Path, small: str) -> None:
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)
    names = {"PYTHON": str(stub), "SERVE": "1", "SMALL": small, "RESULTS": str(tmp_path)}
    names["DOCS"] = str(tmp_path)
    command = ["sh", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (part.splitlines() for part in log.read_text().split("END\n")[:-1])
    assert first[0] == "benchmarks/serve.py" and second[0] == "benchmarks/render.py"
    words = first[1:]
    assert words[words.index("--shape") + 1] == ("tiny" if small else "llava-1.5-7b")
    # All of it is understood: what is wrong is only that vLLM is not asked for.
    given = [*words, "--url", "http://127.0.0.1:9"]
    done = CliRunner().invoke(app, given, env={"COLUMNS": "300", "TERM": "dumb"})
    assert "with --url give --model" in " ".join(done.output.split())
