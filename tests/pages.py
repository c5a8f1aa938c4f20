"""What a page of `compare` is made from, worked out by nobody: figures, answers and pictures."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vlmprune.study.compare.results import (
    SIDE,
    Comparison,
    Row,
    Shown,
    ShownAnswer,
    Skipped,
    Still,
)
from vlmprune.study.stats import Interval

HOSTILE = '</title><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'


def picture(colour: str, size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


def row(name: str, keep: Any, spec: str, score: float, **changes: Any) -> Row:
    about: dict[str, Any] = {
        "control": False,
        "agreement": 0.5,
        "against": None,
        "visual_tokens": 64.0,
        "decoder_flops": 2.75e11,
        "flops": 1.24e12,
        "kv_bytes": 2.0 * 2**20,
        "first_token_ratio": 0.514,
    }
    return Row(
        name, keep, spec, score=Interval(score, score - 0.04, score + 0.03), **about | changes
    )


def result(hostile: str = "") -> Comparison:
    rows = [
        row("all tokens", None, "", 0.9, flops=2e12, first_token_ratio=1.0),
        row("random", 0.25, "random:keep=0.25", 0.5, control=True),
        row("divprune", 0.25, "divprune:keep=0.25", 0.44, against=Interval(-0.06, -0.11, -0.01)),
        row("vispruner", 0.25, "vispruner:keep=0.25", 0.6, against=Interval(0.1, 0.04, 0.18)),
        row(f"plphp{hostile}", None, f"plphp{hostile}", 0.85, visual_tokens=256.0),
    ]
    answers = [
        ShownAnswer("a cat", 1.0, True, kept=256, before=256),
        ShownAnswer("a dog", 0.0, False, [picture("red")], 64, 256, 0.25),
        ShownAnswer("a cat", 1.0, True, [picture("lime", (2 * SIDE, SIDE))], 64, 256, 0.25),
        ShownAnswer(f"a\ncow {hostile}", 0.5, False, [picture("blue")], 64, 256, 0.25),
        ShownAnswer("a cat", 1.0, True, [], 256, 256, 0.4, f"nothing to draw on{hostile}"),
    ]
    shown = [Shown(f"what is it?{hostile}", (f"a cat{hostile}",), [picture("white")], answers)]
    skipped = [Skipped(f"evs:keep=0.25{hostile}", f"there is no video{hostile}.")]
    return Comparison(
        *(f"a model{hostile}", f"folder:x{hostile}", True, 120, rows, skipped, shown),
        *("cpu", "float32", 5, 4),
    )


FACTS = {
    "versions": {"vlmprune": "1", "torch": "2", "transformers": "5", "python": "3"},
    "device_name": "some <CPU>",
    "threads": 1,
}


def sliding(hostile: str = "") -> Comparison:
    """A control and a method at two budgets, and two methods that tell what each layer keeps."""
    rows = [
        row("all tokens", None, "", 0.9, visual_tokens=64.0),
        row("random", 0.25, "random:keep=0.25", 0.5, control=True),
        row("vispruner", 0.25, "vispruner:keep=0.25", 0.6),
        row("random", 8, "random:keep=8", 0.4, control=True),
        row("vispruner", 8, "vispruner:keep=8", 0.5),
        row(f"plphp{hostile}", None, "plphp", 0.8),
        row("fastv:keep=0.5", 0.5, "fastv:keep=0.5", 0.8),
    ]
    parts = {"important": 5, "diverse": 3}
    answers = [
        ShownAnswer("a cat", 1.0, True, kept=64, before=64),
        ShownAnswer("random, 16", 0.0, False, [picture("red")], 16, 64, 0.25),
        ShownAnswer("vispruner, 16", 1.0, True, [picture("lime")], 16, 64, 0.25),
        ShownAnswer("random, 8", 0.0, False, [picture("blue")], 8, 64, 0.125),
        ShownAnswer(
            f"vispruner, 8{hostile}", 0.0, False, [picture("lime")], 8, 64, 0.125, "", parts
        ),
        ShownAnswer("plphp", 1.0, True, [], 64, 64, heads=[[0.0, 0.5], [1.0, 1.0], []]),
        ShownAnswer("fastv", 1.0, True, [], 32, 64, reached=[64, 32, 16]),
    ]
    shown = [Shown(f"what is it?{hostile}", (), [picture("white")], answers)]
    return Comparison("model", "task", True, 120, rows, [], shown, "cpu", "float32", 5, 4)


def read_in_part(hostile: str = "") -> Comparison:
    """A method whose steps read a few tokens each, and one that cuts the cache."""
    rows = [
        row("all tokens", None, "", 0.9, visual_tokens=64.0),
        row("recall", None, "recall", 0.9, visual_tokens=64.0, kv_read=2.0**18),
        row("plphp", None, "plphp", 0.8),
    ]
    strip = [Still(word, [picture("lime")]) for word in (f"cat{hostile}", "")]
    answers = [
        ShownAnswer("a cat", 1.0, True, kept=64, before=64),
        ShownAnswer(
            *("a cat", 1.0, True, [picture("red")], 64, 64, 1.07), read_share=0.14, strip=strip
        ),
        ShownAnswer("a cat", 1.0, True, [], 64, 64, heads=[[0.5]]),
    ]
    shown = [Shown("what is it?", (), [picture("white")], answers)]
    return Comparison("model", "task", True, 120, rows, [], shown, "cpu", "float32", 5, 4)
