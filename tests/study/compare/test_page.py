"""The page that `compare` writes: alone on a desert island, and safe to open."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from pages import FACTS, HOSTILE, picture, read_in_part, result, row, sliding
from vlmprune.draw import layer_map
from vlmprune.errors import VlmpruneError
from vlmprune.io.outputs import Output
from vlmprune.study.compare import page
from vlmprune.study.compare import plot as pareto
from vlmprune.study.compare.results import MARK, MOST, SIDE, Comparison, Shown, ShownAnswer
from vlmprune.study.compare.tables import columns, sections

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads strictly: every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.styles, self.scripts = "", list[str]()
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
        if "script" in self.open:
            self.scripts.append(data)
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@cache
def plot() -> bytes:
    found = result()
    return pareto.plot(pareto.dots_of(found), pareto.axes_of(found), found.what)


@cache
def made(hostile: str = "") -> tuple[str, Reader]:
    text = page.render(result(hostile), plot(), FACTS, f"vlmprune compare {hostile}".strip())
    return text, Reader(text)


@cache
def slid(hostile: str = "") -> Reader:
    return Reader(page.render(sliding(hostile), b"", FACTS))


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


@pytest.mark.parametrize("hostile", ["", HOSTILE])
def test_one_script_is_allowed_by_its_hash(hostile: str) -> None:
    read = slid(hostile)
    assert [about for tag, about in read.tags if tag == "script"] == [{}]
    (script,) = read.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in read.tags if a.get("http-equiv")]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # It is the same on every page: nothing of the figures and answers is in it.
    assert script == slid().scripts[0] and not re.search(r"eval|Function|innerHTML|http", script)
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in slid().tags]
    assert not any(name.startswith("on") for _, about in read.tags for name in about)


def test_the_slider_goes_from_few_tokens_to_many() -> None:
    read = slid()
    (slider,) = [a for tag, a in read.tags if tag == "input" and a["type"] == "range"]
    options = [a["label"] for tag, a in read.tags if tag == "option"]
    # Of 64 tokens, a quarter is more than 8; the budget that comes first is shown first.
    assert options == ["keep 8", "keep 25 %", "keep 50 %"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "1")
    # Without the script the slider is not there, and nothing is hidden but by it.
    (bar,) = [a for _, a in read.tags if a.get("class") == "slider"]
    assert "hidden" in bar and sum("hidden" in a for _, a in read.tags) == 1
    (table,) = [a for _, a in read.tags if a.get("class") == "answers"]
    assert "data-at" not in table
    steps = [a.get("data-step") for tag, a in read.tags if tag == "td" and "colspan" not in a][-7:]
    assert steps == [None, "1", "1", "0", "0", None, "2"]


def test_what_layers_keep_is_drawn_and_told() -> None:
    read = slid()
    (drawn,) = [a for _, a in read.tags if a.get("alt", "").startswith("share kept")]
    assert drawn["alt"].endswith(": layer 0 25 %, layer 1 100 %, layer 2 no cache")
    with Image.open(io.BytesIO(base64.b64decode(drawn["src"].partition("base64,")[2]))) as one:
        assert one.size == (3, 2)
        by_layer = [[one.getpixel((layer, head)) for head in range(2)] for layer in range(3)]
    low, half, *_, high = (layer_map.colour(share) for share in (0.0, 0.5, 1.0))
    assert by_layer == [[low, half], [high, high], [(128, 128, 128)] * 2]
    (bars,) = [a for _, a in read.tags if a.get("class") == "bars"]
    assert bars["aria-label"] == "from layer 0 to 2: 64, 32, 16"
    heights = [a["style"] for tag, a in read.tags if tag == "i" and "layer" in a.get("title", "")]
    assert heights == ["height:100.0%", "height:50.0%", "height:25.0%"]
    shown = "".join(read.text)
    assert "5 important" in shown and "3 diverse" in shown and "0 to 100 % of all" in shown
    assert "0 to 100 % of all" not in made()[0] and "tokens that reach" not in made()[0]


def test_a_page_holds_so_many_questions() -> None:
    one = sliding()
    many = Comparison(**{**vars(one), "shown": one.shown * (MOST + 2)})
    text = page.render(many, b"", FACTS)
    assert text.count("what is it?") == MOST
    assert "2 more questions, without pictures" in text
    assert "without pictures" not in page.render(one, b"", FACTS)


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
    assert opened[1].size == (30, 20) and opened[3].size == (SIDE, SIDE // 2)


def test_the_table_has_the_figures() -> None:
    _, read = made()
    by_name = {cells[0]: cells[1:] for cells in read.rows if cells}
    assert by_name["method"][:-1] == [
        *("visual tokens", "accuracy %", "against random", "LLM TFLOPs", "all TFLOPs"),
        *("visual KV MiB", "first token ratio"),
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
    rows = [row("all tokens", None, "", 0.9, first_token_ms=12.34), row("a", 8, "a:keep=8", 0.5)]
    plain = Comparison(**{**vars(one), "rows": rows, "shown": [], "skipped": []})
    assert list(columns(plain)) == ["tokens", "score", "decoder", "flops", "kv", "first", "ms"]
    (_, first), (title, second) = sections(plain)
    assert first[0].texts["ms"] == "12.3" and second[0].texts["ms"] == ""
    assert title == "keep 8"
    text = page.render(plain, b"", FACTS)
    assert "Left out" not in text and "What is kept" not in text and "first token ms" in text


def test_an_agreement_is_not_called_right() -> None:
    one = result()
    answers = [ShownAnswer("a cat", None, True), ShownAnswer("a dog", None, False)]
    shown = [Shown("what is it?", (), [picture("white")], answers)]
    other = Comparison(**{**vars(one), "rows": one.rows[:2], "shown": shown, "scored": False})
    text = page.render(other, b"", FACTS)
    assert "agreement %" in text and "since no true answers are known" in text
    assert 'class="bad">differs' in text and "right" not in re.sub(
        r"<style>.*</style>", "", text, flags=re.S
    )


def test_only_files_of_its_own_are_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "page.html"
    foreign.write_text("<html>my thesis</html>")
    with pytest.raises(VlmpruneError, match="not of `vlmprune compare`"):
        Output(foreign, MARK).check()
    foreign.write_text(made()[0])
    Output(foreign, MARK).check()
    drawn = tmp_path / "plot.png"
    drawn.write_bytes(plot())
    Output(drawn, MARK).check()
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", "something else")
    picture("white").save(drawn, pnginfo=about)
    with pytest.raises(VlmpruneError, match="not of `vlmprune compare`"):
        Output(drawn, MARK).check()


@pytest.mark.parametrize("hostile", ["", HOSTILE])
def test_a_strip_lights_up_word_by_word(hostile: str) -> None:
    text = page.render(read_in_part(hostile), b"", FACTS)
    read = Reader(text)
    assert [tag for tag, _ in read.tags].count("figure") == 2
    strips = [about for _, about in read.tags if about.get("class") == "strip"]
    # It can be scrolled by the keyboard.
    assert len(strips) == 1 and strips[0]["tabindex"] == "0"
    alts = [about["alt"] for tag, about in read.tags if tag == "img" and "read for" in about["alt"]]
    assert alts == [f"what is read for “cat{hostile}”", "what is read for “…”"]
    said = "".join(read.text)
    assert f"cat{hostile}" in said and "<script" not in text
    assert "visual KV 107 %, read by a step 14 %" in said and "visual KV 40 %" not in said
    assert "the more KV heads read it" in said and "visual KV read: by a decode step" in said
    heads = read.rows[0]
    assert "visual KV read, MiB" in heads
    at = heads.index("visual KV read, MiB")
    # A method that reads all that it holds reads that.
    assert [one[at] for one in read.rows[1:] if len(one) == len(heads)] == ["2.00", "0.250", "2.00"]
    plain = page.render(result(), b"", FACTS)
    assert "strip" not in plain.replace(".strip { flex-wrap", "") and "visual KV read" not in plain
