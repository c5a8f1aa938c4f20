"""The tables and the curve of docs/serving.md, from what `benchmarks/serve.py` writes."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

import render
import serve_page


def figures(rate: float, first: float, blocks: float, processor: float) -> dict[str, Any]:
    return {
        "requests": 10,
        "errors": 0,
        "requests_per_second": rate,
        "prompt_tokens": 600,
        "output_tokens": 33,
        "first_token": {"p50": first, "p95": 2 * first},
        "between_tokens": {"p50": 0.1, "p95": 0.2},
        "in_use": {
            "blocks": {"mean": blocks, "peak": 2 * blocks},
            "running": {"mean": 3, "peak": 4},
        },
        "counts": {"prefix_cache_hits": 0},
        "processor_seconds": {"VLLM::Worker": 10 * processor, "VLLM::EngineCor": 0.4},
        "machine": {"busy_seconds": 10.5 * processor, "client_seconds": 0.1 * processor},
    }


def content() -> dict[str, Any]:
    """Two rounds in which the pruned server is twice and three times as fast."""
    rounds = []
    for times in (2.0, 3.0):
        full, few = figures(2, 1.0, 40, 1.0), figures(2 * times, 0.5, 10, 1 / times)
        few["prompt_tokens"] = 88
        plain = figures(2, 1.0, 40, 1.0)
        done = {"closed": {"all": full, "64": few, "plain": plain}}
        done["cached"] = {"all": figures(4, 1, 40, 0.5), "64": figures(16, 1, 10, 0.1)}
        done["open 0.5"] = {"all": full, "64": few}
        rounds.append(done)
    cases = {
        "all": {"keep": "all", "visual_tokens": 576, "flops": 6e12},
        "64": {"keep": 64, "visual_tokens": 64, "flops": 2e12},
        "plain": {"keep": None, "visual_tokens": 576, "flops": 6e12},
    }
    setting = {
        **{"command": "serve.py", "model": "M", "weights": "random weights"},
        **{"method": "vispruner:keep=64", "device": "a CPU", "environment": {"THREADS": "1"}},
        **{"versions": {"vllm": "0"}, "words": 32, "output_tokens": 33, "clients": 4},
        **{"blocks": 100, "block_tokens": 32, "policy": "no caches", "arguments": "--x"},
    }
    note = "seconds of a CPU: use the ratios only"
    return {"setting": setting, "seconds_are": note, "cases": cases, "rounds": rounds}


def test_the_tables() -> None:
    text = serve_page.section(content())
    # 632 tokens are stored of 633: 20 blocks of 32; 120 of 121: 4. The median of 2 and 3 is 2.5,
    # the quartiles are 2.25 and 2.75.
    assert "| 576, unpruned | 20 | 5 | 4 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 |" in text
    assert "| 64 | 4 | 25 | 4 | 2.50 ± 0.25 | 2.50 ± 0.25 | 3.00 | 0.50 ± 0.00 |" in text
    assert "| 576, without the plugin | 20 | 5 | 4 | 1.00 ± 0.00 |" in text
    # (2.5 - 1) of (3 - 1).
    assert "2.50 ± 0.25 times the requests/s and 2.50 ± 0.25 times the requests per proc" in text
    assert "promise 3.00: of the promised gain 75 % and 75 % arrive" in text
    # Of 1 second of processor time 0.5 is left; of 1/2 and 1/3 it is 0.1, so 0.2 and 0.3.
    assert "| 576 | 1.00 ± 0.00 | 1.00 ± 0.00 | 50 % |" in text
    assert "| 64 | 4.00 ± 0.00 | 5.00 ± 0.00 | 75 % |" in text
    assert "| 0.5 | 576 | 1 | 1 | 1 | 1 | 1 | 40.0 blocks | 80.0 blocks |" in text
    assert "| 0.5 | 64 | 0.50 ± 0.00 |" in text and "| 0.25 ± 0.00 | 0.25 ± 0.00 |" in text
    # 5 loads of 10 requests and two of the open one, twice.
    assert "140 requests, 0 errors, 0 tokens from the prefix cache" in text
    assert not re.search(r"\d ms", text) and "most | requests/s |" not in text


def test_on_a_busy_machine_no_times_are_shown() -> None:
    busy = json.loads(json.dumps(content()))
    for done in busy["rounds"]:
        for load in done.values():
            for told in load.values():
                told["machine"]["busy_seconds"] *= 3
    text = serve_page.section(busy)
    # Ours are 10.1 p + 0.4 of 31.5 p; the 14 cases' p are 8.87 together.
    assert "Other programs took 66 % of the machine's processor time" in text
    assert "| 64 | 4 | 25 | 4 | 2.50 ± 0.25 | 3.00 |" in text
    assert "Open load" not in text and "requests/s" not in text and "first token" not in text
    assert serve_page.plot(busy).startswith(b"\x89PNG")


def test_of_a_gpu_there_are_seconds_and_no_processor_time() -> None:
    gpu = content() | {"seconds_are": "measured on a GPU"}
    text = serve_page.section(gpu)
    assert "| 64 | 4 | 25 | 4 | 5.00 | 2.50 ± 0.25 | 3.00 |" in text
    assert "0.5: 1000 ms" in text and "processor time" not in text
    # The share is then that of time: a request takes 1/2 s, and 1/4 s without encoding.
    assert "| 576 | 1.00 ± 0.00 | 50 % |" in text


def test_one_round_has_no_spread_and_other_parts_may_lack() -> None:
    one = content()
    one["rounds"] = one["rounds"][:1]
    for load in ("cached", "open 0.5"):
        del one["rounds"][0][load]
    del one["cases"]["64"]["flops"]
    text = serve_page.section(one)
    assert "±" not in text and "Open load" not in text and "same picture" not in text.lower()
    assert "promise" not in text


def test_the_page_and_the_curve(tmp_path: Path) -> None:
    page, picture = tmp_path / "serving.md", tmp_path / "serving.png"
    page.write_text("before\n<!-- serve -->\nold\n<!-- end serve -->\nafter\n")
    other = copy.deepcopy(content()) | {"seconds_are": "measured on a GPU"}
    (tmp_path / "serve.json").write_text(json.dumps(content()))
    (tmp_path / "serve-gpu.json").write_text(json.dumps(other))
    render.main(tmp_path, tmp_path)
    text = page.read_text()
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == ["### On a GPU", "### On a CPU"] and "\nold\n" not in text
    assert text.startswith("before\n<!-- serve -->\n") and text.endswith("serve -->\nafter\n")
    assert Image.open(picture).format == "PNG"
