"""The page that `compare` writes: alone on a desert island, and safe to open."""

from __future__ import annotations

import base64
import io
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from vlmprune import page, pareto
from vlmprune.compared import Answer, Interval, Result, Row, Shown, Skipped, columns, sections
from vlmprune.errors import VlmpruneError

HOSTILE = '</title><script>alert(1)</script><img src="https://evil.example/x" onerror=alert(2)>'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads strictly: every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.styles = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


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
        "prefill_ratio": 0.514,
    }
    return Row(
        name, keep, spec, score=Interval(score, score - 0.04, score + 0.03), **about | changes
    )


def result(hostile: str = "") -> Result:
    rows = [
        row("all tokens", None, "", 0.9, flops=2e12, prefill_ratio=1.0),
        row("random", 0.25, "random:keep=0.25", 0.5, control=True),
        row("divprune", 0.25, "divprune:keep=0.25", 0.44, against=Interval(-0.06, -0.11, -0.01)),
        row("vispruner", 0.25, "vispruner:keep=0.25", 0.6, against=Interval(0.1, 0.04, 0.18)),
        row(f"plphp{hostile}", None, f"plphp{hostile}", 0.85, visual_tokens=256.0),
    ]
    answers = [
        Answer("a cat", 1.0, True, kept=256, before=256),
        Answer("a dog", 0.0, False, [picture("red")], 64, 256, 0.25),
        Answer("a cat", 1.0, True, [picture("lime", (2 * page.SIDE, page.SIDE))], 64, 256, 0.25),
        Answer(f"a\ncow {hostile}", 0.5, False, [picture("blue")], 64, 256, 0.25),
        Answer("a cat", 1.0, True, [], 256, 256, 0.4, f"nothing to draw on{hostile}"),
    ]
    shown = [Shown(f"what is it?{hostile}", (f"a cat{hostile}",), [picture("white")], answers)]
    skipped = [Skipped(f"evs:keep=0.25{hostile}", f"there is no video{hostile}.")]
    return Result(
        *(f"a model{hostile}", f"folder:x{hostile}", True, 120, rows, skipped, shown),
        *("cpu", "float32", 5, 4),
    )


FACTS = {
    "versions": {"vlmprune": "1", "torch": "2", "transformers": "5", "python": "3"},
    "device_name": "some <CPU>",
    "threads": 1,
}


@cache
def plot() -> bytes:
    found = result()
    return pareto.plot(found.dots(), found.axes, found.what)


@cache
def made(hostile: str = "") -> tuple[str, Reader]:
    text = page.render(result(hostile), plot(), FACTS, f"vlmprune compare {hostile}".strip())
    return text, Reader(text)


@pytest.mark.parametrize("hostile", ["", HOSTILE])
def test_nothing_is_fetched_or_run(hostile: str) -> None:
    text, read = made(hostile)
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert attributes.get(name, "data:").startswith("data:")
        assert "url(" not in attributes.get("style", "")
    assert "url(" not in read.styles and "@import" not in read.styles
    if not hostile:
        assert "http" not in text.replace("http-equiv", "")
    policies = [a["content"] for _, a in read.tags if a.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")
    assert "http" not in policies[0] and "script" not in policies[0]


def test_hostile_texts_are_shown_as_they_are() -> None:
    _, read = made(HOSTILE)
    shown = "".join(read.text)
    for text in (
        "a model",
        "folder:x",
        "plphp",
        "what is it?",
        "a cat",
        "a\ncow ",
        "evs:keep=0.25",
    ):
        assert text + HOSTILE in shown
    assert f"there is no video{HOSTILE}." in shown and "some <CPU>" in shown
    assert f"nothing to draw on{HOSTILE}" in shown
    # The same tags as with texts that mean no harm.
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in made()[1].tags]


def test_pictures_are_in_the_page() -> None:
    _, read = made()
    links = [a["src"] for tag, a in read.tags if tag == "img"]
    opened = []
    for link in links:
        form, _, content = link.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as one:
            assert form == f"data:image/{one.format.lower()}"  # type: ignore[union-attr]
            opened.append(one.convert("RGB"))
    # The plot, the question's own, and three drawn.
    assert len(opened) == 5
    seen = [one.getpixel((5, 5)) for one in opened[1:]]
    for got, wanted in zip(seen, ["white", "red", "lime", "blue"], strict=True):
        wish = Image.new("RGB", (1, 1), wanted).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(got, wish, strict=True)) < 8  # type: ignore[arg-type]
    assert opened[1].size == (30, 20) and opened[3].size == (page.SIDE, page.SIDE // 2)


def test_the_table_has_the_figures() -> None:
    _, read = made()
    by_name = {cells[0]: cells[1:] for cells in read.rows if cells}
    assert by_name["method"][:-1] == [
        *("visual tokens", "accuracy %", "against random", "LLM TFLOPs", "all TFLOPs"),
        *("KV MiB", "prefill ratio"),
    ]
    assert by_name["all tokens"][:-1] == ["64", "90.0 (86-93)", "", "0.275", "2.00", "2.00", "1.00"]
    assert by_name["vispruner"][1] == "60.0 (56-63)"
    assert by_name["vispruner"][2] == "+10.0 ±7.0 wins"
    assert by_name["divprune"][2] == "-6.0 ±5.0 loses"
    assert by_name["random"][2] == ""
    # By budget, controls first, those without a budget last.
    order = [cells[0] for cells in read.rows if len(cells) in (1, 9)]
    assert order[: order.index("own budget") + 2] == [
        *("method", "all tokens", "keep 25 %", "random", "divprune", "vispruner"),
        *("own budget", "plphp"),
    ]


def test_a_gpus_times_are_told_and_no_control_needs_no_column() -> None:
    one = result()
    rows = [row("all tokens", None, "", 0.9, prefill_ms=12.34), row("a", 8, "a:keep=8", 0.5)]
    plain = Result(**{**vars(one), "rows": rows, "shown": [], "skipped": []})
    assert list(columns(plain)) == ["tokens", "score", "decoder", "flops", "kv", "prefill", "ms"]
    (_, first), (title, second) = sections(plain)
    assert first[0].texts["ms"] == "12.3" and second[0].texts["ms"] == ""
    assert title == "keep 8"
    text = page.render(plain, b"", FACTS)
    assert "Left out" not in text and "What is kept" not in text and "prefill ms" in text


def test_an_agreement_is_not_called_right() -> None:
    one = result()
    answers = [Answer("a cat", None, True), Answer("a dog", None, False)]
    shown = [Shown("what is it?", (), [picture("white")], answers)]
    other = Result(**{**vars(one), "rows": one.rows[:2], "shown": shown, "scored": False})
    text = page.render(other, b"", FACTS)
    assert "agreement %" in text and "since no true answers are known" in text
    assert 'class="bad">differs' in text and "right" not in re.sub(
        r"<style>.*</style>", "", text, flags=re.S
    )


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "new" / "page.html"
    page.check_free(target)
    page.write(target, "first")
    assert target.read_text() == "first"

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(VlmpruneError, match="No space left"):
            page.write(target, "second")
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_only_files_of_its_own_are_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "page.html"
    foreign.write_text("<html>my thesis</html>")
    with pytest.raises(VlmpruneError, match="not of `vlmprune compare`"):
        page.check_free(foreign)
    with pytest.raises(VlmpruneError, match="is a folder"):
        page.check_free(tmp_path)
    with pytest.raises(VlmpruneError, match="cannot be written"):
        page.check_free(foreign / "page.html")
    foreign.write_text(made()[0])
    page.check_free(foreign)
    drawn = tmp_path / "plot.png"
    drawn.write_bytes(plot())
    page.check_free(drawn)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", "something else")
    picture("white").save(drawn, pnginfo=about)
    with pytest.raises(VlmpruneError, match="not of `vlmprune compare`"):
        page.check_free(drawn)
