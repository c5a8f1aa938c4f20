"""`vlmprune run` with a method that reads its cache in part: its figures and its film."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commandline import COFFEE, QUESTION, call, config_of_embedded
from vlmprune import Recall, VisPruner, embedded
from vlmprune.hosts.families import FAMILIES
from vlmprune.io import models
from vlmprune.io.outputs import maker
from vlmprune.study import word_by_word

READ = 0.0625


@pytest.fixture(scope="module")
def loaded() -> Any:
    return embedded.load()


@pytest.fixture
def ask(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`run` on the loaded model, as JSON unless told otherwise."""
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))

    def run(*words: Any, images: tuple[Any, ...] = (COFFEE,), form: str = "--json") -> Any:
        options = ("--repeat", 1, "--decode-tokens", 0, "--device", "cpu")
        result = call("run", *images, QUESTION, *options, *words, *[form] * bool(form))
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if form else result.stdout

    return run


def expected() -> tuple[int, int]:
    """Bytes of 256 tokens' keys and values in one KV head of a layer, and layers times heads."""
    text = config_of_embedded()["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return 2 * 256 * head * 4, text["num_hidden_layers"] * text["num_key_value_heads"]


def test_a_film_lights_up_what_the_library_says_was_read(
    ask: Any, loaded: Any, tmp_path: Path
) -> None:
    target = tmp_path / "made" / "answer.gif"
    content = ask("--method", f"recall:read={READ}", "--save-recall", target)
    assert content["films"] == [str(target)] and content["overlays"] == []
    assert maker(target) == "vlmprune run"
    model, processor = loaded
    with Image.open(COFFEE) as image:
        inputs = processor(
            text=f"USER: <image>\n{QUESTION} ASSISTANT:", images=image, return_tensors="pt"
        )
    with Recall(read=READ, watch="tokens")(model) as handle:
        model.generate(**inputs, do_sample=False, max_new_tokens=64)
    reading = handle.report.reading
    steps = len(reading.steps)
    # The first token is prefill's.
    assert steps == content["pruned"]["new_tokens"] - 1 > 2
    with Image.open(target) as film:
        assert getattr(film, "n_frames", 1) == steps
        frames = []
        for number in range(steps):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB"), dtype=float)[20:468, 20:468])
    for number, frame in enumerate(frames):
        lit = reading.lit(number)[0]
        cells = frame.mean(axis=2).reshape(16, 28, 16, 28).mean(axis=(1, 3)).flatten()
        with Image.open(COFFEE) as image:
            photo = np.asarray(image.convert("L").resize((448, 448)), dtype=float)
        own = photo.reshape(16, 28, 16, 28).mean(axis=(1, 3)).flatten()
        # Above what the dimmed picture shows, cells are as bright as heads read them.
        more = cells - 0.28 * own
        assert np.corrcoef(more / (own + 30), lit.numpy())[0, 1] > 0.9
        assert more[lit == 0].max() < 12 < more[int(lit.argmax())]
        other = reading.lit((number + 1) % steps)[0]
        assert not torch.equal(lit, other)


def test_bytes_held_and_read_are_told(ask: Any) -> None:
    dense, heads = expected()
    content = ask("--method", f"recall:read={READ},watch=mass")
    reading, pruned, full = content["report"]["reading"], content["pruned"], content["full"]
    assert full["kv_bytes"] == full["kv_bytes_read"] == reading["dense_bytes"] == dense * heads
    # Keys in four bits, and for each token a scale, of a channel a mean and a scale; and the sum of
    # the values.
    sketch = reading["sketch_bytes"]
    assert dense * heads / 16 < sketch < dense * heads / 12
    assert pruned["kv_bytes"] == dense * heads + sketch and pruned["kv_bytes_host"] == 0
    assert pruned["kv_bytes_read"] == dense * heads * READ + sketch
    assert reading["share_read"] == pytest.approx(pruned["kv_bytes_read"] / full["kv_bytes"])
    assert content["report"]["kv_bytes_read"] == pruned["kv_bytes_read"]
    assert 0.4 < reading["share_of_attention"] < 1 and reading["share_fetched"] == 0

    away = ask("--method", f"recall:read={READ},store=host")
    assert away["pruned"]["kv_bytes"] == sketch
    assert away["pruned"]["kv_bytes_host"] == dense * heads
    assert away["pruned"]["kv_bytes_read"] == pruned["kv_bytes_read"]
    assert away["report"]["reading"]["share_fetched"] == READ
    assert away["report"]["reading"]["share_of_attention"] is None

    other = ask("--method", "plphp:r=0.5,dr=0")["pruned"]
    assert other["kv_bytes_read"] == other["kv_bytes"] and other["kv_bytes_host"] == 0


def test_the_table_tells_them(ask: Any) -> None:
    shown = ask("--method", "recall:watch=mass,store=host", form="")
    lines = {line.split("  ")[0]: line.split() for line in shown.splitlines() if "MiB" in line}
    assert lines["visual KV"][-2:] == ["-92", "%"]
    assert lines["in host memory"][3:] == ["0.00", "MiB", "0.938", "MiB"]
    assert lines["read by a step"][-2:] == ["-86", "%"]
    assert "a step fetches 6.2 % from host memory" in shown and "% of these layers'" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "5 layers read in part: a picture's 16 best tokens a KV head" in shown
    aside = ask("--method", "recall", form="")
    assert "5 layers read in whole, which is faster here" in aside and "in part" not in aside
    plain = ask(form="")
    assert "read by a step" not in plain and "sketches" not in plain


def test_several_pictures_have_a_film_each(ask: Any, tmp_path: Path) -> None:
    content = ask(
        *("--method", "vispruner:keep=64+recall:read=8", "--save-recall", tmp_path / "o.webp"),
        *("--max-new-tokens", 3),
        images=(COFFEE, embedded.scenes() / "grass.jpg"),
    )
    assert content["films"] == [str(tmp_path / f"o-{n}.webp") for n in (1, 2)]
    # What is timed is not slowed down by watching, and reads in part as what is drawn does.
    assert content["method"] == "vispruner:keep=64|recall:read=8,always=true"
    for name in content["films"]:
        with Image.open(name) as film:
            assert getattr(film, "n_frames", 1) == 2


def test_a_still(ask: Any, tmp_path: Path) -> None:
    ask("--method", "recall", "--save-recall", tmp_path / "o.png", "--max-new-tokens", 4)
    with Image.open(tmp_path / "o.png") as sheet:
        # Three steps in two columns.
        assert sheet.format == "PNG" and sheet.width == 2 * (224 + 40)


def test_watching_is_switched_on_and_left_as_it_is() -> None:
    assert word_by_word.watched(Recall(read=5)) == Recall(read=5, watch="tokens")
    own = Recall(watch="mass", first_layer=1)
    assert word_by_word.watched(own) == own
    chain = word_by_word.watched(VisPruner(8) | Recall(read=5))
    assert chain == VisPruner(8) | Recall(read=5, watch="tokens")
    assert word_by_word.watched(VisPruner(8)) is None


@pytest.mark.parametrize("option", ["--save-recall", "--save-overlay"])
def test_a_family_without_boxes_is_told_of_and_answers(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    medium = FAMILIES["llava"].media[0]
    monkeypatch.setattr(type(medium), "overlay", "")
    words = (option, tmp_path / "o.png", "--repeat", 1, "--decode-tokens", 0)
    done = call("run", COFFEE, QUESTION, "--method", "recall", *words)
    assert done.exit_code == 0 and "row one column one" in done.output
    assert "where visual tokens lie is not known for" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_an_answer_of_one_token_lights_nothing(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    first = loaded[1].tokenizer("row one")["input_ids"]
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", first)
    words = ("--save-recall", tmp_path / "o.gif", "--repeat", 1, "--decode-tokens", 0)
    done = call("run", COFFEE, QUESTION, "--method", "recall", *words)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert "the answer ends with its first token, which takes no step" in shown
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_read_whole_light_nothing(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(*loaded))
    words = ("--save-recall", tmp_path / "o.gif", "--repeat", 1, "--decode-tokens", 0)
    done = call("run", COFFEE, QUESTION, "--method", "recall:floor=300", *words)
    assert done.exit_code == 0 and "row one column one" in done.output
    assert "reads every picture here whole" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
