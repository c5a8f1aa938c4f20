"""The page of `compare` as a browser shows it: nothing asked for, nothing to complain of.

Skipped where there is no Chromium; the variable VLMPRUNE_TEST_CHROMIUM names one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import browser
from pages import FACTS, HOSTILE, sliding
from vlmprune.io.outputs import write
from vlmprune.study.compare import page
from vlmprune.study.compare import plot as pareto

# What of the answers a reader sees, in the table's order.
SEEN = """[...document.querySelectorAll("#answers td .text")]
  .filter(one => one.checkVisibility()).map(one => one.textContent)"""
HEADS = """[...document.querySelectorAll("#answers thead th[scope=colgroup]")]
  .filter(one => one.checkVisibility()).map(one => one.textContent)"""
ALL = ["a cat", "random, 16", "vispruner, 16", "random, 8", "vispruner, 8", "plphp", "fastv"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"no Chromium is installed; {browser.VARIABLE} may name one")
    one = browser.Browser(program, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


def written(folder: Path, text: str) -> Path:
    path = folder / "compare.html"
    write(path, text)
    return path


def html(hostile: str = "") -> str:
    result = sliding(hostile)
    plot = pareto.plot(pareto.dots_of(result), pareto.axes_of(result), result.what)
    return page.render(result, plot, FACTS)


def test_the_slider_shows_a_budget_at_a_time(chromium: browser.Browser, tmp_path: Path) -> None:
    path = written(tmp_path, html())
    chromium.open(path)
    assert chromium.complaints == [] and chromium.requests == [path.as_uri()]
    pictures = chromium.value(
        "[...document.images].filter(one => one.checkVisibility())"
        ".map(one => one.complete && one.naturalWidth > 0)"
    )
    # The plot, the question's own, two of this budget, and the map.
    assert pictures == [True] * 5
    quarter = ["a cat", "random, 16", "vispruner, 16", "plphp"]
    assert chromium.value(SEEN) == quarter
    assert chromium.value(HEADS) == ["all tokens", "keep 25 %", "own budget"]

    # By the keyboard alone; a table that scrolls may come before the slider.
    for _ in range(3):
        if chromium.value("document.activeElement.id") != "step":
            chromium.press("Tab", 9)
    assert chromium.value("document.activeElement.id") == "step"
    chromium.press("ArrowLeft", 37)
    assert chromium.value(SEEN) == ["a cat", "random, 8", "vispruner, 8", "plphp"]
    assert chromium.value("document.querySelector('output').textContent") == "keep 8"
    assert chromium.value("document.activeElement.ariaValueText") == "keep 8"
    chromium.press("End", 35)
    assert chromium.value(SEEN) == ["a cat", "plphp", "fastv"]
    chromium.press("Tab", 9)
    chromium.press(" ", 32, " ")
    assert chromium.value("document.activeElement.checked") is True
    assert chromium.value(SEEN) == ALL
    chromium.press(" ", 32, " ")
    assert chromium.value(SEEN) == ["a cat", "plphp", "fastv"]
    # On paper there is no slider to move.
    chromium.ask("Emulation.setEmulatedMedia", media="print")
    assert chromium.value(SEEN) == ALL
    chromium.ask("Emulation.setEmulatedMedia", media="")
    assert chromium.complaints == [] and chromium.requests == [path.as_uri()]


def test_without_scripts_all_budgets_are_there(chromium: browser.Browser, tmp_path: Path) -> None:
    path = written(tmp_path, html())
    chromium.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(path)
        assert chromium.value(SEEN) == ALL
        assert chromium.value("document.getElementById('budget').checkVisibility()") is False
        assert chromium.requests == [path.as_uri()]
    finally:
        chromium.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_texts_do_nothing(chromium: browser.Browser, tmp_path: Path) -> None:
    path = written(tmp_path, html(HOSTILE))
    chromium.open(path)
    assert chromium.complaints == [] and chromium.requests == [path.as_uri()]
    chromium.value("document.getElementById('step').focus()")
    chromium.press("ArrowLeft", 37)
    assert chromium.value(SEEN)[2] == f"vispruner, 8{HOSTILE}"


def test_the_policy_refuses_what_escaping_let_through(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    # A page that was spoilt: this is what the tests above would see, and the browser refuses it.
    added = "<script>document.title = 'taken'</script><img src='https://vlmprune.invalid/x.png'>"
    chromium.open(written(tmp_path, html().replace("</header>", f"{added}</header>")))
    refused = " ".join(chromium.complaints)
    assert "script" in refused and "https://vlmprune.invalid/x.png" in refused
    assert chromium.value("document.title") != "taken"
    # Without the policy the request goes out, and is noticed.
    text = html().replace("</header>", f"{added}</header>")
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    chromium.open(written(tmp_path, text[:start] + text[text.index(">", start) + 1 :]))
    assert "https://vlmprune.invalid/x.png" in chromium.requests
    assert chromium.value("document.title") == "taken"
