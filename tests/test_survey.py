"""`scripts/survey.py` calls right what is right, and finds faults that are planted."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from repository import ROOT
from vlmprune import PLPHP, RandomTokens, Recall, VisPruner, VlmpruneError
from vlmprune.hosts import release
from vlmprune.views import EncoderView, Selection

sys.path.insert(0, str(ROOT / "scripts"))

import survey
from surveyed import references, table, tiny, verdicts
from surveyed.asked import Request, generate, request

KINDS = survey.classes()
FAULTS = ("late", "traceback", "wrong")


@pytest.mark.parametrize(
    ("kind", "path", "refused"),
    [
        ("qwen3_vl", "record", set()),
        ("vipllava", "generic", set()),
        # No self-check, but placeholders, by which tokens can be left out without any choice.
        ("idefics2", "decoder", {"VisPruner", "PLPHP", "Recall"}),
        # Recurrent: compared with a shorter prompt, and no rows may leave between layers.
        ("llava:qwen3_5_text", "record", {"FastV"}),
    ],
)
def test_what_is_right_is_called_right(kind: str, path: str, refused: set[str]) -> None:
    line = verdicts.line_of(kind, KINDS[kind.partition(":")[0]])
    assert line.why == "" and line.path == path
    assert line.asked == "a padded batch, 3 images"
    for name, found in line.methods.items():
        assert found.verdict == ("refused" if name in refused else "right"), (name, found.detail)
        if found.verdict == "right":
            assert found.distance is not None and found.control is not None
            assert found.distance < 1e-5 < 1e-3 < found.control
    assert table.path(line.as_dict()) == path


@pytest.fixture(scope="module")
def asked() -> tuple[Any, Request]:
    model, field = tiny.built("vipllava", KINDS["vipllava"])
    return model, request(model, "vipllava", field)


class _Handle:
    """A handle whose report says something else."""

    def __init__(self, handle: Any, lie: Any) -> None:
        self.handle, self.lie = handle, lie

    @property
    def report(self) -> Any:
        return self.lie(self.handle.report)

    def detach(self) -> None:
        self.handle.detach()


def _swapped(report: Any) -> Any:
    totals = [len(layout.labels) for layout in report.layouts]
    kept = [
        torch.tensor(verdicts.others(own.tolist(), total))
        for own, total in zip(report.kept, totals, strict=True)
    ]
    return replace(report, kept=kept)


def _heads_exchanged(report: Any) -> Any:
    return replace(report, layers=[replace(one, mask=one.mask.flip(1)) for one in report.layers])


def _one_step_late(report: Any) -> Any:
    steps = report.reading.steps
    return replace(report, reading=replace(report.reading, steps=[steps[-1], *steps[:-1]]))


LIES = {
    "other tokens": (VisPruner(keep=0.4), _swapped),
    "other positions": (
        RandomTokens(keep=0.4, positions="original"),
        lambda report: replace(report, positions="compact"),
    ),
    "other tokens of heads": (PLPHP(alpha=0.8, beta=0.6, per_head="adaptive"), _heads_exchanged),
    "other tokens of a step": (
        Recall(read=0.2, floor=0, rest="none", watch="tokens"),
        _one_step_late,
    ),
}


@pytest.mark.parametrize("name", list(LIES))
def test_a_planted_fault_is_called_wrong(
    name: str, asked: tuple[Any, Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, lie = LIES[name]
    model, req = asked
    assert verdicts.judged(model, req, lambda: pruner).verdict == "right"
    honest = type(pruner).attach

    def attach(self: Any, model: Any) -> Any:
        return _Handle(honest(self, model), lie)

    monkeypatch.setattr(type(pruner), "attach", attach)
    found = verdicts.judged(model, req, lambda: pruner)
    assert found.verdict == "wrong"
    assert found.distance is not None and found.distance > 1e-3


@dataclass(frozen=True)
class _Failing(RandomTokens):
    """Raises when it is to choose."""

    error: Any = None

    def select(self, view: EncoderView) -> Selection:
        raise self.error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(VlmpruneError("it was known before."), "late"), (TypeError("no such thing"), "traceback")],
)
def test_what_fails_in_a_call_is_a_fault(
    error: Exception, verdict: str, asked: tuple[Any, Request]
) -> None:
    found = verdicts.judged(*asked, lambda: _Failing(keep=0.4, error=error))
    assert found.verdict == verdict and str(error) in found.detail
    line = {"path": "record", "why": "", "methods": {"RandomTokens": {"verdict": verdict}}}
    assert table.path(line) == "faulty"
    model, req = asked
    assert references.distance(generate(model, req.inputs), req.logits) == 0


def test_a_control_that_does_not_differ_tells_nothing(asked: tuple[Any, Request]) -> None:
    assert verdicts.judged(*asked, lambda: RandomTokens(keep=1.0)).verdict == "not told"


def test_masked_and_shortened_references_agree(asked: tuple[Any, Request]) -> None:
    model, req = asked
    generator = torch.Generator().manual_seed(2)
    keep = ~req.visual | (torch.rand(req.visual.shape, generator=generator) < 0.5)
    seen = references.from_layers(dict.fromkeys(range(9), keep[:, None]), 0)
    for compact in (False, True):
        left = references.masked(model, req, seen, keep if compact else None)
        right = references.shortened(model, req, keep, compact)
        assert references.distance(left, right) < 1e-5
    assert references.distance(left, req.logits) > 1e-3
    everything = references.from_layers(dict.fromkeys(range(9), torch.ones_like(keep)[:, None]), 0)
    assert references.distance(references.masked(model, req, everything), req.logits) < 1e-6


def test_few_layers_keep_every_kind() -> None:
    kinds = ["linear"] * 5 + ["full"] + ["linear"] * 5 + ["sliding"]
    given = {
        "num_hidden_layers": 12,
        "layer_types": kinds,
        "hidden_size": 4096,
        "own": {"5": {"head_dim": 8}, "11": {"head_dim": 9}},
    }
    found = tiny.shrunk(given)
    assert found["num_hidden_layers"] == 4 and found["hidden_size"] == 64
    assert found["layer_types"] == ["linear", "linear", "full", "sliding"]
    assert set(found["own"]) == {"2", "3"}


@pytest.mark.parametrize("kind", ["mistral4", "qwen2_audio", "florence2", "qwen3_omni_moe"])
def test_what_cannot_be_tried_says_why(kind: str) -> None:
    line = verdicts.line_of(kind, KINDS[kind]).as_dict()
    assert line["why"] and table.path(line) == "apart"
    assert line["why"] in table.in_words(line | {"seconds": 0})


def test_a_process_that_takes_too_long_is_ended() -> None:
    line = survey.surveyed("llava", KINDS["llava"], seconds=0.01, gibibytes=6)
    assert line["why"] == "took over 0.01 s" and table.path(line) == "apart"


def test_the_page_is_of_the_newest_release_that_is_allowed() -> None:
    text = survey.PAGE.read_text(encoding="utf-8")
    said = set(re.findall(r"^transformers (\d+\.\d+)\.\S+$", text, flags=re.MULTILINE))
    (minor,) = said
    allowed, (major, number) = SpecifierSet(release.TESTED), map(int, minor.split("."))
    assert Version(f"{minor}.0") in allowed
    assert Version(f"{major}.{number + 1}.0") not in allowed
    for name in ("survey", "decoders"):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end {name} -->") == 1


def test_the_page_shows_what_the_tests_prove() -> None:
    text = survey.PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- proved -->\n\n(.*?)\n<!-- end proved -->", text, flags=re.DOTALL)
    assert shown == table.proved(), "python scripts/survey.py --proved writes it"


def test_tables_are_written_between_their_marks(tmp_path: Any) -> None:
    page = tmp_path / "models.md"
    page.write_text("a\n<!-- survey -->\nof before\n<!-- end survey -->\nb\n", encoding="utf-8")
    refusal = "vlmprune cannot follow C: it has a | in it; `vlmprune models` lists those."
    methods = {name: {"verdict": "refused", "detail": refusal} for name in table.METHODS}
    line = {"kind": "c", "cls": "C", "path": "refused", "asked": "", "why": "", "seconds": 1}
    survey.write(page, "survey", table.page({"c": line | {"methods": methods}}))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- survey -->\n") and text.endswith("<!-- end survey -->\nb\n")
    assert "of before" not in text and "1 refused, 0 faulty" in text
    assert "| c | `C` | refused | no | no | no | no | no | it has a \\| in it |" in text
