"""Calibration of PLPHP: γ measured without a trace, thresholds, the file and the plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import model, request, text_config
from vlmprune import PLPHP, VlmpruneError, calibrate, embedded
from vlmprune.hosts import families
from vlmprune.io.models import Loaded
from vlmprune.study.calibrate.results import Gammas


def gammas(values: Any, layers: tuple[int, ...] | None = None) -> Gammas:
    table = torch.as_tensor(values, dtype=torch.float64)
    return Gammas(table, layers or tuple(range(table.shape[1])), 1, "a model with 2 layers")


@pytest.fixture(scope="module")
def trained() -> tuple[Loaded, Gammas]:
    """The embedded model and γ of some of its demonstration questions."""
    loaded = Loaded(*embedded.load())
    listed = json.loads((embedded.scenes() / "scenes.json").read_text())
    kinds = ("at", "count", "read", "describe")

    def batches() -> Any:
        for item in listed:
            asked = {q["kind"]: q["question"] for q in item["questions"] if q["kind"] in kinds}
            picture = Image.open(embedded.scenes() / item["file"])
            yield from calibrate.questions_for(loaded, [picture], list(asked.values()), batch=3)

    return loaded, calibrate.measure(loaded.model, batches())


def test_gammas_are_those_of_the_reports_and_nothing_stays() -> None:
    built = model()
    requests = [request(built, [1, 2, 0]), request(built, [1], seed=3), request(built, [0])]
    before = [built.generate(**one.inputs, max_new_tokens=3) for one in requests]
    said: list[str] = []
    found = calibrate.measure(built, (one.inputs for one in requests), window=2, say=said.append)
    after = [built.generate(**one.inputs, max_new_tokens=3) for one in requests]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    expected = []
    for one in requests[:2]:
        with PLPHP(window=2)(built) as handle:
            built.generate(**one.inputs, max_new_tokens=1)
        layers = handle.report.layers
        rows = zip(*(layer.gamma for layer in layers), strict=True)
        expected += [row for row in rows if row[0] is not None]
    assert len(found) == 3 and found.layers == (0, 1, 2) and found.window == 2
    assert torch.equal(found.values, torch.tensor(expected, dtype=torch.float64))
    assert found.architecture == families.architecture(built)
    assert said[-1] == "3 questions seen"


def test_thresholds_restated() -> None:
    values = np.random.default_rng(0).random((7, 5))
    alpha, beta = calibrate.thresholds(gammas(values), 0.2, 0.9)
    assert alpha == pytest.approx(np.quantile(values, 0.9), abs=1e-6)
    assert beta == pytest.approx(np.quantile(values, 0.2), abs=1e-6)
    # By default a quarter of all layers lies on either side, so the mean rate stays r.
    many = gammas(np.random.default_rng(1).random((100, 4)))
    alpha, beta = calibrate.thresholds(many)
    assert int((many.values >= alpha).sum()) == int((many.values < beta).sum()) == 100
    assert float(many.retention(PLPHP(alpha=alpha, beta=beta)).mean()) == pytest.approx(0.4)


def test_retention_is_the_pruners() -> None:
    found = gammas([[0.05, 0.15, 0.3], [0.25, 0.1, 0.0]], layers=(2, 3, 5))
    rates = found.retention(PLPHP(first_pruned_layer=3))
    assert rates.tolist() == [[1, 0.4, 0.7], [1, 0.4, pytest.approx(0.1)]]


def test_round_trip(tmp_path: Path) -> None:
    built = model()
    req = request(built, [2, 1])
    found = calibrate.measure(built, [req.inputs])
    alpha, beta = calibrate.thresholds(found)
    content = calibrate.document(found, alpha, beta, "tiny", 0.25, 0.75)
    file = tmp_path / "tiny.json"
    calibrate.save(content, file)
    assert json.loads(file.read_text()) == content
    read = PLPHP.from_file(file)
    here = families.architecture(built)
    assert read == PLPHP(alpha=alpha, beta=beta, calibrated_on=here)
    assert PLPHP.from_file(file, r=0.2, dr=0.1).r == 0.2
    with read(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    assert {rate for layer in handle.report.layers for rate in layer.retention} > {0.4}

    other = model(text_config=text_config(kv_heads=4))
    with pytest.raises(VlmpruneError, match="calibrated on another model"):
        read.attach(other)
    PLPHP.from_file(file, calibrated_on=None).attach(other).detach()


def test_the_documents_figures() -> None:
    found = gammas([[0.0, 0.52], [0.2, 0.58], [1.0, 0.52]], layers=(1, 4))
    content = calibrate.document(found, 0.5, 0.1, "a name", beta_quantile=0.2)
    assert content["plphp"] == {
        "alpha": 0.5,
        "beta": 0.1,
        "window": 1,
        "calibrated_on": "a model with 2 layers",
    }
    assert content["model"] == "a name" and content["samples"] == 3
    assert content["quantiles"] == {"alpha": None, "beta": 0.2}
    first, second = content["layers"]
    assert first == {
        **{"layer": 1, "mean": 0.4, "min": 0.0, "q25": 0.1, "median": 0.2, "q75": 0.6, "max": 1.0}
    }
    assert second["layer"] == 4 and second["median"] == 0.52
    counts = content["histogram"]["counts"]
    assert sum(counts) == 6 and counts[0] == 1 and counts[-1] == 1
    assert counts[10] == 2 and counts[11] == 1
    assert set(content["versions"]) == {"vlmprune", "torch", "transformers"}


def test_the_trained_models_layers_fall_into_all_three_levels(
    trained: tuple[Loaded, Gammas], tmp_path: Path
) -> None:
    loaded, found = trained
    assert len(found) >= 12 and len(found.layers) == 5
    alpha, beta = calibrate.thresholds(found)
    assert 0 < beta < alpha < 1
    file = tmp_path / "embedded.json"
    calibrate.save(calibrate.document(found, alpha, beta, "embedded", 0.25, 0.75), file)
    pruner = PLPHP.from_file(file, dr=0.2)
    assert set(found.retention(pruner).flatten().mul(10).round().int().tolist()) == {2, 4, 6}
    with pruner(loaded.model) as handle:
        picture = Image.open(embedded.scenes() / "coffee.jpg")
        for inputs in calibrate.questions_for(loaded, [picture], ["describe the picture."]):
            loaded.model.generate(**inputs, max_new_tokens=2)
    assert len({layer.retention[0] for layer in handle.report.layers}) > 1


def test_questions_for_pairs_every_image_with_every_question(
    trained: tuple[Loaded, Gammas],
) -> None:
    loaded, _ = trained
    pictures = [Image.new("RGB", (224, 224), colour) for colour in ("black", "white")]
    asked = ["where is the cat?", "count the cats.", "describe the picture."]
    batches = list(calibrate.questions_for(loaded, iter(pictures), asked, batch=4))
    assert [len(one["input_ids"]) for one in batches] == [4, 2]
    texts = [loaded.processor.decode(row) for one in batches for row in one["input_ids"]]
    assert all(question in text for question, text in zip(asked * 2, texts, strict=True))
    means = [float(row.mean()) for one in batches for row in one["pixel_values"]]
    assert max(means[:3]) < 0 < min(means[3:])


@pytest.mark.parametrize(("samples", "layers"), [(1, 2), (40, 5), (700, 80)])
def test_the_plot_is_a_picture(samples: int, layers: int, tmp_path: Path) -> None:
    values = torch.rand(samples, layers, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "plot.png"
    calibrate.plot(gammas(values), PLPHP(alpha=0.8, beta=0.3), file, "A model")
    assert 10_000 < file.stat().st_size < 400_000
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert 1000 < picture.width < 2000 and 500 < picture.height < 1500
        colours = len(picture.convert("RGB").getcolors(2**24))
    assert colours > 20


def test_refusals(tmp_path: Path) -> None:
    built = model()
    with pytest.raises(VlmpruneError, match="no image to calibrate on"):
        calibrate.measure(built, [request(built, [0]).inputs])
    with pytest.raises(VlmpruneError, match="no image to calibrate on"):
        calibrate.measure(built, [])
    with torch.no_grad():
        built.model.language_model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(VlmpruneError, match="is not a number"):
        calibrate.measure(built, [request(built, [1]).inputs])
    with pytest.raises(VlmpruneError, match="no threshold tells layers apart"):
        calibrate.thresholds(gammas([[0.3, 0.3], [0.3, 0.3]]))
    for low, high in ((0.75, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(VlmpruneError, match="rising order"):
            calibrate.thresholds(gammas([[0.1, 0.3]]), low, high)
    with pytest.raises(VlmpruneError, match="batch=0 is too few"):
        list(calibrate.questions_for(Loaded(None, None), [], [], batch=0))


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VlmpruneError, match="is a folder"):
        calibrate.check_target(tmp_path)
    absent = tmp_path / "absent" / "file.json"
    for act in (
        lambda: calibrate.check_target(absent),
        lambda: calibrate.save({}, absent),
        lambda: calibrate.plot(gammas([[0.1, 0.3]]), PLPHP(), absent),
    ):
        with pytest.raises(VlmpruneError, match="does not exist"):
            act()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # a superuser may write anywhere
        with pytest.raises(VlmpruneError, match="Permission denied"):
            calibrate.check_target(locked / "file.json")
    assert calibrate.check_target(tmp_path / "new.json") == tmp_path / "new.json"
