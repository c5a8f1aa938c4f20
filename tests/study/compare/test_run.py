"""What `compare` compares, how it measures, and what it makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlmprune.learned import Learned

from compared_methods import First, Refusing
from tiny import model
from vlmprune import costs, embedded
from vlmprune.errors import VlmpruneError
from vlmprune.io import models, sources
from vlmprune.methods import METHODS, VisPruner
from vlmprune.study.compare import configurations, results, tables
from vlmprune.study.compare import run as compare
from vlmprune.study.compare.results import Comparison
from vlmprune.study.evals import run as evaluate
from vlmprune.study.evals.results import Evaluation
from vlmprune.study.tasks import Folder, Sample, Task
from vlmprune.study.tasks.answered import Answered


@pytest.fixture
def methods() -> Iterator[None]:
    """Two that the package always has, a control, and one that refuses."""
    before = dict(METHODS)
    some = {name: METHODS[name] for name in ("vispruner", "plphp")}
    # Emptied and filled, rather than item by item, so that the order comes back too.
    METHODS.clear()
    METHODS.update(some | {"random": First, "refusing": Refusing})
    yield
    METHODS.clear()
    METHODS.update(before)


# --- lists ---


def test_budgets_are_numbers_or_fractions() -> None:
    assert configurations.keeps_of("64, 0.25,1,1.0") == [64, 0.25, 1, 1.0]
    assert [type(one) for one in configurations.keeps_of("1,1.0")] == [int, float]


def test_every_open_budget_is_filled(methods: None) -> None:
    found = configurations.ways_of(
        [
            "vispruner:important_ratio=0.75",
            "plphp",
            "vispruner:keep=8",
            "random",
            "vispruner+plphp",
        ],
        [0.5, 8],
    )
    assert [(way.name, way.keep, way.control, way.reference) for way in found] == [
        ("random", 0.5, True, True),
        ("vispruner:important_ratio=0.75", 0.5, False, False),
        ("vispruner + plphp", 0.5, False, False),
        ("random", 8, True, True),
        ("vispruner:important_ratio=0.75", 8, False, False),
        ("vispruner", 8, False, False),
        ("vispruner + plphp", 8, False, False),
        ("plphp", None, False, False),
    ]
    assert found[1].pruner == VisPruner(0.5, 0.75)
    assert found[4].spec == "vispruner:keep=8,important_ratio=0.75"


def test_the_packages_own_controls_come_first() -> None:
    found = configurations.ways_of(["vispruner", "evs", "uniform", "downsample", "random"], [0.25])
    assert [(way.name, way.control, way.reference, way.videos) for way in found] == [
        ("random", True, True, False),
        ("uniform", True, False, False),
        ("downsample", True, False, False),
        ("vispruner", False, False, False),
        ("evs", False, False, True),
    ]


def test_every_method_of_the_package_can_be_asked_for(tmp_path: Path) -> None:
    settings = {"gsearch": ":rates=1.0;0.5;0.5"}
    for name, cls in METHODS.items():
        if issubclass(cls, Learned):
            small = {"tokens": 4} if name == "vistog" else {}
            cls.fresh(model(), **small).save_pretrained(tmp_path / name)
            settings[name] = f":weights={tmp_path / name}"
    found = configurations.ways_of([name + settings.get(name, "") for name in METHODS], [0.5, 8])
    counts = {name: sum(way.name.startswith(name) for way in found) for name in METHODS}
    for name, cls in METHODS.items():
        has_budget = "keep" in {field.name for field in fields(cls)}
        assert counts[name] == (2 if has_budget else 1)
    assert [way.spec for way in found if way.keep is None] == [
        f"{name}{settings.get(name, '')}" for name in METHODS if counts[name] == 1
    ]


@pytest.mark.parametrize(
    ("specs", "keeps", "said"),
    [
        (["magic"], [0.5], "method 'magic' is unknown"),
        ([""], [0.5], "the method is empty"),
        (["vispruner", "random"], [0.5, 0], "keep=0 leaves no visual tokens"),
        (["vispruner"], [1.5], "outside (0, 1]"),
        (["vispruner", "vispruner:keep=0.5"], [0.5], "holds vispruner:keep=0.5 twice"),
        (["plphp", "vispruner:keep=4"], [0.5], "--keep is no setting of plphp, vispruner:keep=4"),
    ],
)
def test_mistakes_in_lists(specs: list[str], keeps: list[float], said: str) -> None:
    with pytest.raises(VlmpruneError) as error:
        configurations.ways_of(specs, keeps)
    assert said in str(error.value)


def test_budgets_nobody_asked_for_need_not_be_used() -> None:
    assert [way.name for way in configurations.ways_of(["plphp"], [0.5], given=False)] == ["plphp"]


# --- figures from answers ---


def answered(name: str, scores: list[float | None], tokens: float) -> Evaluation:
    """One question about each of some pictures."""
    results = tuple(
        Answered(
            *(f"q{i}", f"g{i}", "", "yes" if score else f"no {name}" if score is None else "no"),
            *(score, tokens, 256.0, 10 * tokens, 2560.0, 20 * tokens, 5120.0),
            *(30 * tokens, 7680.0, 0.1),
        )
        for i, score in enumerate(scores)
    )
    return Evaluation("task", name, "model", results)


def test_figures_come_from_the_answers(methods: None) -> None:
    found = configurations.ways_of(["random", "vispruner", "plphp"], [0.25])
    full = answered("full", [1.0] * 18 + [0.0] * 2, 256)
    chance = answered("random", [1.0] * 10 + [0.0] * 10, 64)
    worse = answered("worse", [0.0] * 8 + [1.0] * 2 + [0.0] * 10, 64)
    other = answered("other", [1.0] * 16 + [0.0] * 4, 128)
    times = {"all tokens": 8.0} | {way.spec: 2.0 for way in found}
    pairs = list(zip(found, [chance, worse, other], strict=True))
    rows = compare._rows(full, pairs, times, absolute=False)
    assert [row.name for row in rows] == ["all tokens", "random", "vispruner", "plphp"]
    assert [row.score.value for row in rows] == [0.9, 0.5, 0.1, 0.8]
    assert [row.first_token_ratio for row in rows] == [1.0, 0.25, 0.25, 0.25]
    assert all(row.first_token_ms is None for row in rows)
    assert [row.visual_tokens for row in rows] == [256, 64, 64, 128]
    assert [row.kv_bytes for row in rows] == [30 * row.visual_tokens for row in rows]
    assert [row.agreement for row in rows] == [1.0, 12 / 20, 4 / 20, 18 / 20]
    # Eight of twenty right answers are lost: far from an accident of the pictures.
    assert rows[2].against is not None and rows[2].against.value == pytest.approx(-0.4)
    assert rows[2].verdict == "loses" and rows[0].full and not rows[1].full
    # No control has the budget of the last, and none is compared with itself.
    assert rows[1].against is None and rows[3].against is None
    assert compare._rows(full, pairs, times, absolute=True)[1].first_token_ms == 2.0


def test_few_pictures_have_no_interval(methods: None) -> None:
    found = configurations.ways_of(["random", "vispruner"], [0.25])
    full, chance = answered("full", [1.0] * 9, 256), answered("random", [0.0] * 9, 64)
    best = answered("best", [1.0] * 9, 64)
    times = {"all tokens": 8.0} | {way.spec: 2.0 for way in found}
    rows = compare._rows(full, list(zip(found, [chance, best], strict=True)), times, False)
    assert rows[2].against is not None and rows[2].against.value == 1.0
    assert rows[2].against.low is None and rows[2].verdict == ""
    assert rows[0].score.low is None


def test_without_true_answers_agreement_is_the_score(methods: None) -> None:
    found = configurations.ways_of(["random", "vispruner"], [0.25])
    full, same = answered("full", [None] * 3, 256), answered("full", [None] * 3, 64)
    chance = answered("chance", [None] * 3, 64)
    times = {"all tokens": 8.0} | {way.spec: 2.0 for way in found}
    rows = compare._rows(full, list(zip(found, [chance, same], strict=True)), times, False)
    assert [row.score.value for row in rows] == [1.0, 0.0, 1.0]
    assert rows[2].against is not None and rows[2].against.value == 1.0


def test_shown_questions_are_about_different_pictures() -> None:
    samples = [
        compare.Sample(f"{picture}{kind}", (), "?", group=picture)
        for picture in "abc"
        for kind in "xy"
    ]
    assert [one.id for one in compare._pick(samples, 2)] == ["ax", "by"]
    assert [one.id for one in compare._pick(samples, 5)] == ["ax", "by", "cx", "ay", "bx"]
    assert len(compare._pick(samples, 99)) == 6 and compare._pick(samples, 0) == []


# --- for real ---


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(*embedded.load())


@pytest.fixture
def task(tmp_path: Path) -> Folder:
    """Three questions about two pictures."""
    folder = tmp_path / "asked"
    folder.mkdir()
    for name in ("coffee.jpg", "grass.jpg"):
        shutil.copy(embedded.scenes() / name, folder)
    listed = [
        {"image": "coffee.jpg", "question": "where is the cat?", "answers": "row one column one"},
        {"image": "coffee.jpg", "question": "is there a cake?", "answers": ["no"]},
        {"image": "grass.jpg", "question": "can you see a ball?", "answers": ["yes"]},
    ]
    (folder / "questions.json").write_text(json.dumps(listed))
    return Folder(folder)


@pytest.fixture
def one_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "TIMED", 1)


def ask(loaded: models.Loaded, task: Any, specs: list[str], **options: Any) -> Comparison:
    found = configurations.ways_of(specs, [0.5], given=False)
    return compare.compare(loaded, sources.find_model(None), found, task, repeat=1, **options)


class Texts(Task):
    """A task of one's own that asks about no picture."""

    name = "texts"

    def samples(self, limit: int | None = None) -> list[Sample]:
        return [Sample("1", (), "what is red?", ("blood",), group="1")][:limit]


def test_a_task_without_pictures_is_refused(loaded: models.Loaded, methods: None) -> None:
    said = "^task 'texts' has no questions about pictures; choose another"
    with pytest.raises(VlmpruneError, match=said):
        ask(loaded, Texts(), ["vispruner"])


def test_a_comparison_for_real(
    loaded: models.Loaded, task: Folder, methods: None, one_timed: None
) -> None:
    told: list[tuple[int, int]] = []
    result = ask(
        *(loaded, task, ["vispruner:keep=32", "refusing", "random"]),
        show=2,
        tell=lambda message, done, total: told.append((done, total)),
    )
    assert (result.questions, result.scored, result.timed) == (3, True, 1)
    assert [one.spec for one in result.skipped] == ["refusing:keep=0.5"]
    assert result.skipped[0].reason == "Refusing needs a video; use random."
    assert [(row.name, row.keep, row.visual_tokens) for row in result.rows] == [
        ("all tokens", None, 256),
        ("random", 0.5, 128),
        ("vispruner", 32, 32),
    ]
    config = loaded.model.config
    encoder = costs.encoder_flops(config, 1, pixels=224)
    for row in result.rows:
        assert row.decoder_flops == pytest.approx(
            costs.prefill_flops(config, int(row.visual_tokens))
        )
        assert row.flops == pytest.approx(row.decoder_flops + encoder)
        assert row.kv_bytes == costs.kv_bytes(config, int(row.visual_tokens), 4)
        assert row.first_token_ratio > 0
    # The table's figures are those of `evaluate`.
    apart = evaluate.evaluate(loaded, VisPruner(32), task)
    assert result.rows[2].score.value == apart.accuracy
    # What is shown: a question about each picture, its answers, and what was kept of it.
    assert [one.question for one in result.shown] == ["where is the cat?", "can you see a ball?"]
    for shown in result.shown:
        full, chance, cut = shown.answers
        assert cut.parts == {"important": 16, "diverse": 16} and chance.parts == {}
        assert cut.heads == cut.reached == []
        assert full.same and (full.kept, full.before, full.drawn) == (256, 256, [])
        assert (chance.kept, chance.before, chance.kv_share) == (128, 256, 0.5)
        # The first half of the tokens is the upper half of the picture; the lower is dimmed.
        (drawn,) = chance.drawn
        upper, lower = (
            drawn.convert("L")
            .crop((0, top, drawn.width, top + 100))
            .resize((1, 1))
            .getpixel((0, 0))
            for top in (20, drawn.height - 120)
        )
        assert drawn.size == (results.SIDE, results.SIDE) and lower < 0.6 * upper  # type: ignore[operator]
    assert all(done <= total for done, total in told) and len({total for _, total in told}) == 1
    assert told == sorted(told) and told[-1][0] == told[-1][1] - 1
    content = json.loads(json.dumps(result.as_dict()))
    assert content["rows"][1]["score"]["value"] == result.rows[1].score.value
    assert content["shown"][0]["answers"][0]["text"] == "row one column one."


def test_what_layers_keep_for_real(
    loaded: models.Loaded, task: Folder, one_timed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "MOST", 1)
    specs = ["fastv:layer=2", "plphp:r=0.25,dr=0,first_pruned_layer=1"]
    result = ask(loaded, task, specs, limit=2, show=2)
    _, inside, cache = result.shown[0].answers
    assert inside.heads == cache.reached == [] and inside.parts == cache.parts == {}
    assert inside.reached == [256, 256, 128, 128, 128]
    # Layer 0 is left whole; in the others each of the three KV heads keeps a quarter.
    assert cache.heads == [[1.0] * 3, *([[0.25] * 3] * 4)]
    assert [len(one.drawn) for one in result.shown[0].answers] == [0, 1, 1]
    # Beyond what a page holds there are figures, but no pictures.
    assert [len(one.drawn) for one in result.shown[1].answers] == [0, 0, 0]
    assert result.shown[1].answers[1].reached == inside.reached


def test_what_steps_read_for_real(loaded: models.Loaded, task: Folder, one_timed: None) -> None:
    specs = ["recall:always=true", "recall:floor=300", "recall"]
    result = ask(loaded, task, specs, limit=1, show=1)
    full, part, whole, aside = result.rows
    assert (aside.kv_read, aside.kv_bytes) == (None, full.kv_bytes)
    assert (full.kv_read, whole.kv_read, whole.kv_bytes) == (None, None, full.kv_bytes)
    sketch = part.kv_bytes - full.kv_bytes
    assert part.kv_read == full.kv_bytes / 16 + sketch and sketch > 0
    assert tables.columns(result)["read"] == "visual KV\nread, MiB"
    _, read, plain, slower = result.shown[0].answers
    assert read.kv_share == part.kv_bytes / full.kv_bytes > 1
    assert read.read_share == pytest.approx(part.kv_read / full.kv_bytes)
    # Four words, a full stop and the end, the first of them by prefill.
    assert [one.word for one in read.strip] == ["one", "column", "one", ".", ""]
    assert [one.images[0].size for one in read.strip] == [(results.STILL,) * 2] * 5
    assert len({one.images[0].tobytes() for one in read.strip}) == 5
    # The cat stands in the upper left; what is said of it last is read there.
    last = read.strip[2].images[0].convert("L")
    corner, elsewhere = (
        last.crop(box).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        for box in ((12, 12, 36, 36), (60, 130, 150, 150))
    )
    assert corner > 2 * elsewhere
    (over_all,) = read.drawn
    assert over_all.size == (results.SIDE, results.SIDE)
    assert plain.strip == [] and plain.read_share is None and plain.drawn == []
    assert "reads every picture here whole" in plain.trouble
    # So few tokens are read whole in less time, and then that is what is shown.
    assert slower.strip == [] and slower.read_share == 1.0 and "always=true" in slower.trouble
    told = json.loads(json.dumps(result.as_dict()))["shown"][0]["answers"]
    assert [one["read_share"] for one in told] == [None, read.read_share, None, 1.0]


def test_a_comparison_goes_on(
    loaded: models.Loaded,
    task: Folder,
    one_timed: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "kept"
    found = configurations.ways_of(["vispruner"], [0.5])
    source = sources.find_model(None)

    def again() -> Comparison:
        return compare.compare(loaded, source, found, task, repeat=1, show=0, store=store)

    first = again()
    files = sorted(store.rglob("*.jsonl"))
    assert len(files) == 2

    def answer(*_: Any) -> None:
        raise AssertionError("a question was answered again")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate._Runner, "answer", answer)
        second = again()
        assert [row.score for row in second.rows] == [row.score for row in first.rows]
        # Another picture of that name is another question.
        shutil.copy(embedded.scenes() / "launch.jpg", task.folder / "grass.jpg")
        with pytest.raises(AssertionError, match="answered again"):
            again()


def test_nothing_can_be_compared(loaded: models.Loaded, task: Folder, methods: None) -> None:
    with pytest.raises(VlmpruneError, match="no method could be compared; of refusing:keep=0"):
        ask(loaded, task, ["refusing"])
