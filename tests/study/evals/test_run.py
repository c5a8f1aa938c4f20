"""Evaluations: the same answers as the plain way, resumed runs, intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from tiny import PATCH, SIDE, VOCABULARY, model
from vlmprune import PLPHP, DivPrune, Pruner, Recall, VisPruner, VlmpruneError, embedded
from vlmprune.hosts import contract
from vlmprune.io.models import Loaded, prepare
from vlmprune.methods import FastV
from vlmprune.study.evals import run as module
from vlmprune.study.evals.run import evaluate
from vlmprune.study.tasks import Sample, Scenes
from vlmprune.version import __version__


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*embedded.load())


class Some(Scenes):
    """Short questions and a long one about each of two pictures."""

    def samples(self, limit: int | None = None) -> list[Sample]:
        found = [
            one
            for one in Scenes().samples(16)
            if one.id in ("000-at", "000-where", "000-describe", "001-at", "001-describe")
        ]
        return found[:limit]


@dataclass(frozen=True)
class LooksAtTheQuestion(VisPruner):
    """Stands for methods that must encode for each question."""

    text_agnostic: ClassVar[bool] = False


def plain(
    loaded: Loaded, pruner: Pruner | None, samples: list[Sample], tokens: int = 40
) -> list[str]:
    """Answers one by one: the model's own processor and `generate`, and no more."""
    answers = []
    handle = None if pruner is None else pruner.attach(loaded.model)
    for one in samples:
        inputs = prepare(loaded, one.opened(), one.question)
        out = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        answers.append(loaded.processor.decode(new, skip_special_tokens=True).strip())
    if handle is not None:
        handle.detach()
    return answers


@pytest.mark.parametrize(
    "pruner",
    [
        None,
        VisPruner(keep=48),
        PLPHP(r=0.2, dr=0.1),
        VisPruner(keep=96) | PLPHP(r=0.4),
        FastV(keep=64),
        LooksAtTheQuestion(keep=48),
    ],
    ids=["unpruned", "before", "cache", "both", "inside", "question"],
)
def test_answers_are_those_of_the_plain_way(loaded: Loaded, pruner: Pruner | None) -> None:
    samples = Some().samples()
    found = evaluate(loaded, pruner, Some(), batch=5)
    assert [one.id for one in found.results] == [one.id for one in samples]
    assert [one.answer for one in found.results] == plain(loaded, pruner, samples)
    for one, sample in zip(found.results, samples, strict=True):
        assert one.score == (one.answer == sample.answers[0])
    # Nothing stays on the model.
    assert "forward" not in vars(loaded.model)
    assert "generate" not in vars(loaded.model)


def test_each_picture_is_encoded_once(loaded: Loaded) -> None:
    seen: list[int] = []
    hook = loaded.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    shared: dict = {}
    # The contract's own run of the tower, once an attachment, aside.
    with contract.switched_off():
        for pruner in (None, PLPHP(r=0.5), VisPruner(keep=64)):
            evaluate(loaded, pruner, Some(), visions=shared)
        assert seen == [1] * 4
        assert len(shared) == 4
        seen.clear()
        evaluate(loaded, LooksAtTheQuestion(keep=64), Some())
    hook.remove()
    assert sum(seen) == len(Some().samples())


def any_resolution() -> Loaded:
    """A tiny LLaVA-NeXT with its real processor: crops, newline tokens, no chat template."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "<image>", "ASSISTANT:", "is", "this"]
    names += ["that", *(f"word{i}" for i in range(VOCABULARY - 10))]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    built = model("llava_next")
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=built.config.image_grid_pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Loaded(built, processor)


class Several(Scenes):
    """Questions about one picture, about two of other sizes, and about none."""

    def samples(self, limit: int | None = None) -> list[Sample]:
        draw = np.random.default_rng(0).integers(256, size=(160, 160, 3), dtype=np.uint8)
        wide, tall, square = (
            Image.fromarray(draw[:h, :w]) for w, h in ((160, 50), (60, 90), (64, 64))
        )
        found = [
            Sample("0", (wide,), "is this", group="wide"),
            Sample("1", (wide,), "is that this", group="wide"),
            Sample("2", (tall, square), "that", group="both"),
            Sample("3", (), "this is that"),
            Sample("4", (tall, square), "is this that this", group="both"),
        ]
        return found[:limit]


@pytest.mark.parametrize("pruner", [None, VisPruner(keep=0.5), FastV(keep=0.5, layer=1)])
def test_several_images_of_any_resolution(pruner: Pruner | None) -> None:
    loaded, samples = any_resolution(), Several().samples()
    found = evaluate(loaded, pruner, Several(), batch=3)
    assert [one.id for one in found.results] == ["0", "1", "2", "3", "4"]
    answers = [one.answer for one in found.results]
    assert answers == plain(loaded, pruner, samples, tokens=16)
    assert len(set(answers)) > 2
    assert found.accuracy is None
    # Of each batch the mean, so that the sum is exact.
    expected = 0
    for one in samples:
        with (pruner or VisPruner(keep=1.0))(loaded.model) as handle:
            loaded.model.generate(**prepare(loaded, one.opened(), one.question), max_new_tokens=1)
        expected += handle.report.kv_bytes_after
    assert found.total("kv_bytes") == expected


def test_figures(loaded: Loaded) -> None:
    full = evaluate(loaded, None, Some(), limit=3)
    half = evaluate(loaded, VisPruner(keep=0.5), Some(), limit=3)
    cut = evaluate(loaded, PLPHP(r=0.5, dr=0.0), Some(), limit=3)
    # Width 192, 6 query and 3 KV heads of 32, feed-forward 512, 5 layers, 4 bytes a value.
    for n, found in ((256, full), (128, half)):
        layer = 2 * n * 192 * 192 + 2 * n * 192 * 96 + 2 * n * n * 192 + 3 * n * 192 * 512
        for one in found.results:
            assert one.visual_tokens == n
            assert one.visual_tokens_before == 256
            assert one.decoder_flops == pytest.approx(2 * 5 * layer)
            assert one.kv_bytes == 2 * 5 * 3 * 32 * 4 * n
            assert one.flops_before - one.flops == pytest.approx(
                one.decoder_flops_before - one.decoder_flops
            )
            assert one.seconds > 0
    assert [full.share(name) for name in ("visual_tokens", "flops", "kv_bytes")] == [1, 1, 1]
    assert half.share("kv_bytes") == cut.share("kv_bytes") == 0.5
    assert cut.share("decoder_flops") == 1
    assert [one.share("kv_read") for one in (full, half, cut)] == [1, 0.5, 0.5]
    part = evaluate(
        loaded, Recall(read=0.0625, sketch="exact", rest="none", always=True), Some(), limit=3
    )
    # All keys, and the values of a sixteenth with their keys.
    assert part.share("kv_read") == 0.5625 and part.share("kv_bytes") == 1
    assert full.method == "unpruned"
    assert half.method == repr(VisPruner(keep=0.5))


def test_tokens_dropped_inside_count_for_the_layers_that_saw_them(loaded: Loaded) -> None:
    [inside] = evaluate(loaded, FastV(keep=64, layer=2), Some(), limit=1).results
    [both] = evaluate(loaded, VisPruner(keep=96) | FastV(keep=64, layer=3), Some(), limit=1).results
    assert inside.visual_tokens == pytest.approx((2 * 256 + 3 * 64) / 5)
    assert both.visual_tokens == pytest.approx((3 * 96 + 2 * 64) / 5)
    for one in (inside, both):
        # Every layer caches what it sees.
        assert one.kv_bytes / one.kv_bytes_before == pytest.approx(one.visual_tokens / 256)
        assert one.decoder_flops < one.decoder_flops_before


def test_a_killed_run_goes_on(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, store = VisPruner(keep=48), tmp_path / "new" / "store.jsonl"

    def content() -> list[dict]:
        lines = [json.loads(line) for line in store.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    told: list[tuple[int, int]] = []
    whole = evaluate(
        loaded, pruner, Some(), batch=4, store=str(store), progress=lambda *two: told.append(two)
    )
    expected, n = content(), len(whole.results)
    assert len(expected) == n + 1
    assert told[0] == (0, n)
    assert told[-1] == (n, n)

    # Killed within the third line after the first.
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:3]) + lines[3][:20])
    again = evaluate(loaded, pruner, Some(), batch=4, store=str(store))
    assert content() == expected
    assert [one.answer for one in again.results] == [one.answer for one in whole.results]

    # Killed within the first line.
    store.write_text(lines[0][:20])
    evaluate(loaded, pruner, Some(), limit=2, batch=4, store=str(store))
    assert content() == expected[:3]

    # With all done, nothing runs, and a longer run continues a shorter one.
    evaluate(loaded, pruner, Some(), batch=4, store=str(store))
    assert sorted(line.get("id", "") for line in content()) == sorted(
        line.get("id", "") for line in expected
    )
    monkeypatch.setattr(module._Runner, "answer", None)
    same = evaluate(loaded, pruner, Some(), batch=4, store=str(store))
    assert [one.answer for one in same.results] == [one.answer for one in whole.results]


def test_a_store_of_something_else_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    store = tmp_path / "store.jsonl"
    evaluate(loaded, VisPruner(keep=48), Some(), limit=1, store=str(store))
    before = store.read_bytes()
    with pytest.raises(VlmpruneError, match="is of another method"):
        evaluate(loaded, VisPruner(keep=49), Some(), limit=1, store=str(store))
    with pytest.raises(VlmpruneError, match="is of another task"):
        evaluate(loaded, VisPruner(keep=48), Other(), limit=1, store=str(store))
    assert store.read_bytes() == before
    # Of another version, and of one up to 0.2, which did not say so.
    head, *rest = before.decode().splitlines(keepends=True)
    old = json.loads(head)
    assert old.pop("version") == __version__
    store.write_text(head.replace(__version__, "0.0.1") + "".join(rest))
    with pytest.raises(VlmpruneError, match=r"is of another version \(0\.0\.1\)"):
        evaluate(loaded, VisPruner(keep=48), Some(), limit=1, store=str(store))
    store.write_text(json.dumps(old) + "\n" + "".join(rest))
    with pytest.raises(VlmpruneError, match=r"0\.2 or earlier.*another path\.$"):
        evaluate(loaded, VisPruner(keep=48), Some(), limit=1, store=str(store))
    with pytest.raises(VlmpruneError, match=r"path; budget='crop' for DivPrune was the default"):
        evaluate(loaded, DivPrune(keep=48), Some(), limit=1, store=str(store))
    store.write_text("a list\nof words\n")
    with pytest.raises(VlmpruneError, match="holds no results"):
        evaluate(loaded, VisPruner(keep=48), Some(), limit=1, store=str(store))
    assert store.read_text() == "a list\nof words\n"
    # Without a line end it is no torn store either, nor is what is no text.
    for content in (b"a word", b"\xff\xfe\n", b"\xff"):
        store.write_bytes(content)
        with pytest.raises(VlmpruneError, match="holds no results"):
            evaluate(loaded, VisPruner(keep=48), Some(), limit=1, store=str(store))
        assert store.read_bytes() == content
    with pytest.raises(VlmpruneError, match="cannot be written"):
        evaluate(loaded, None, Some(), limit=1, store=str(tmp_path))


class Other(Some):
    name: ClassVar[str] = "other"


@pytest.mark.parametrize("name", ["limit", "batch"])
def test_numbers_out_of_range(loaded: Loaded, name: str) -> None:
    with pytest.raises(VlmpruneError, match=f"--{name} 0 is too few"):
        evaluate(loaded, None, Some(), **{name: 0})  # type: ignore[arg-type]
