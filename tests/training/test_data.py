"""Training data: read, checked, and made into rows of which only the answers carry loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from training_data import SIDE, entries, listed, scenes, written
from vlmprune import embedded
from vlmprune.errors import VlmpruneError
from vlmprune.io.processors import scale
from vlmprune.training.data import Turn, read
from vlmprune.training.draws import Draws, held_out
from vlmprune.training.rows import IGNORE, RowMaker


def small() -> Any:
    """The embedded model's processor, for small pictures."""
    processor = LlavaProcessor.from_pretrained(embedded.path())
    scale(processor, SIDE)
    return processor


def test_entries_are_read_in_order(tmp_path: Path) -> None:
    found = read(written(tmp_path))
    assert [one.id for one in found] == [f"scene-{n}" for n in range(len(found))]
    first = scenes()[0]["questions"]
    assert found[0].turns[:2] == tuple(Turn(q["question"], q["answer"]) for q in first[:2])
    assert found[0].images[0].is_file()


def test_several_pictures_other_names_and_text_alone(tmp_path: Path) -> None:
    names = [scene["file"] for scene in scenes()[:2]]
    said = [
        {"from": "user", "value": "<image> <image>\nwhat differs?"},
        {"from": "assistant", "value": "all."},
    ]
    content = [{"images": names, "conversations": said}]
    text = [{"from": "human", "value": "hello?"}, {"from": "gpt", "value": "yes."}]
    content.append({"id": 7, "conversations": text})
    (one,) = read(written(tmp_path, content), embedded.scenes())
    assert [file.name for file in one.images] == names and one.id == "0"
    assert one.turns == (Turn("what differs?", "all."),)


def _changed(number: int, **changes: Any) -> list[dict[str, Any]]:
    content = listed()
    content[number] |= changes
    return content


def _said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in pairs]


HUMAN = ("human", "<image>\nwhere?")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds no list of conversations"),
        ({"a": 1}, "holds no list of conversations"),
        ([[]], "entry 1 of {} is no object"),
        (_changed(1, image="absent.jpg"), "entry 2 of {} names '{folder}/absent.jpg', which does"),
        (_changed(1, image=[3]), "entry 2 of {} has no usable 'image'"),
        (_changed(2, conversations="x"), "entry 3 of {} has no usable 'conversations'"),
        (_changed(2, conversations=[]), "entry 3 of {} has no usable 'conversations'"),
        (_changed(0, conversations=_said(("narrator", "x"))), "entry 1 of {} has no usable 'conv"),
        (_changed(0, conversations=_said(HUMAN)), "entry 1 of {} does not alternate"),
        (
            _changed(0, conversations=_said(("gpt", "a"), HUMAN)),
            "entry 1 of {} does not alternate",
        ),
        (
            _changed(3, conversations=_said(("human", "where?"), ("gpt", "there."))),
            "entry 4 of {} has 1 picture(s) and 0 <image> mark(s)",
        ),
        (
            _changed(3, conversations=_said(("human", "where?"), ("gpt", "<image>there."))),
            "entry 4 of {} has 1 picture(s) and 1 <image> mark(s)",
        ),
        (
            _changed(3, conversations=_said(HUMAN, ("gpt", " "))),
            "entry 4 of {} has an empty text, number 2",
        ),
        (
            [{"conversations": _said(("human", "hello?"), ("gpt", "yes."))}],
            "no entry of {} has a picture",
        ),
    ],
)
def test_mistakes_name_the_file_and_the_entry(tmp_path: Path, content: Any, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(VlmpruneError) as caught:
        read(path)
    assert said.format(path, folder=tmp_path) in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with pytest.raises(VlmpruneError, match=r"data\.json' cannot be read \(No such file"):
        read(path)
    path.write_text("{")
    with pytest.raises(VlmpruneError, match=rf"^{path} is no JSON \(.*; write it as "):
        read(path)


def test_only_answers_carry_loss(tmp_path: Path) -> None:
    """Each row is prompt, answer and end token; its labels are the answer and the end alone."""
    some = entries(tmp_path)[:2]
    processor = small()
    rows = RowMaker(processor)
    batch = rows.batch(some, [(0, 2), (1,)])
    words = processor.tokenizer
    pairs = [(some[0], 0), (some[0], 2), (some[1], 1)]
    for row, (entry, number) in enumerate(pairs):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        turn = entry.turns[number]
        carried = labels != IGNORE
        assert torch.equal(labels[carried], ids[carried])
        assert not bool((carried & ~real).any())
        expected = words(turn.answer)["input_ids"] + [words.eos_token_id]
        assert ids[carried].tolist() == expected
        prompt = f"USER: <image>\n{turn.question} ASSISTANT:"
        made = processor(text=prompt, images=rows.opened(entry), return_tensors="pt")
        assert ids[real & ~carried].tolist() == made["input_ids"][0].tolist()
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1, "rows of one length would show no padding"


def test_placeholders_are_spread_as_the_processor_spreads_them(tmp_path: Path) -> None:
    """Prompts after the first of a size are spread without the processor, several pictures too."""
    names = [scene["file"] for scene in scenes()[:2]]
    said = _said(("human", "<image> <image>\nwhere?"), ("gpt", "there."), ("human", "is there a"))
    said += _said(("gpt", "no."))
    content = [{"image": names, "conversations": said}]
    (entry,) = read(written(tmp_path, content), embedded.scenes())
    processor = small()
    rows = RowMaker(processor)
    for number, turn in enumerate(entry.turns):
        ids, start = rows.row(entry, number)
        prompt = f"USER: <image>\n<image>\n{turn.question} ASSISTANT:"
        made = processor(text=prompt, images=rows.opened(entry), return_tensors="pt")
        assert ids[:start].tolist() == made["input_ids"][0].tolist()


def test_a_turned_picture_has_placeholders_of_its_own(tmp_path: Path) -> None:
    """Two files of one stored size, of which EXIF turns one, have other numbers of them."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, more in (("wide.png", {}), ("turned.png", {"exif": exif})):
        Image.new("RGB", (112, 56)).save(tmp_path / name, **more)
    said = _said(("human", "<image>\nwhere?"), ("gpt", "there."))
    content = [{"image": name, "conversations": said} for name in ("wide.png", "turned.png")]
    tokenizer, side = small().tokenizer, {"height": 56, "width": 56}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size=side,
            image_grid_pinpoints=[[56, 112], [112, 56]],
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    rows, lengths = RowMaker(processor), set()
    for entry in read(written(tmp_path, content), tmp_path):
        ids, start = rows.row(entry, 0)
        prompt = rows.prompt(entry, entry.turns[0])
        made = processor(text=prompt, images=rows.opened(entry), return_tensors="pt")
        assert ids[:start].tolist() == made["input_ids"][0].tolist()
        lengths.add(start)
    # Two tiles side by side have 4 lines, above each other 8, each ended by a newline.
    assert len(lengths) == 2


def test_a_row_that_is_too_long(tmp_path: Path) -> None:
    (entry, *_) = entries(tmp_path)
    rows = RowMaker(small(), longest=20)
    with pytest.raises(VlmpruneError, match=r"turn 1 of entry 'scene-0' has \d+ tokens, more than"):
        rows.row(entry, 0)


def test_samples_depend_on_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    some = entries(tmp_path)
    samples = Draws(some, 4 * len(some), 2, seed=3)
    order = [samples[i] for i in range(len(samples))]
    again = Draws(some, 4 * len(some), 2, seed=3)
    assert [again[i] for i in reversed(range(len(again)))] == order[::-1]
    other = Draws(some, 4 * len(some), 2, seed=4)
    assert [other[i] for i in range(len(other))] != order
    orders = []
    for epoch in range(4):
        part = order[epoch * len(some) : (epoch + 1) * len(some)]
        orders.append([one.entry.number for one in part])
        assert sorted(orders[-1]) == list(range(len(some)))
    # Each pass has an order of its own.
    assert len(set(map(tuple, orders))) == 4
    assert all(len(set(one.turns)) == 2 for one in order)
    assert len({one.turns for one in order}) > 1
    assert Draws(some, 1, 0, 0)[0].turns == (0, 1, 2, 3)


def test_held_out_entries_share_no_picture_with_the_others(tmp_path: Path) -> None:
    content = listed()
    content.insert(0, json.loads(json.dumps(content[-1])))
    some = read(written(tmp_path, content))
    seen, kept = held_out(some, 1)
    assert kept == [some[-1]]
    assert seen == some[1:-1]
