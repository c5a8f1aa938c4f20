"""What a harness asks, as a conversation and settings of `generate`, and where its answers end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from vlmprune import VlmpruneError
from vlmprune.integrations import arguments
from vlmprune.integrations.answering import Answerer, conversation, cut, generation


@pytest.mark.parametrize(
    ("given", "drawn", "limit"),
    [
        (None, False, 5),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, False, 5),
        ({"temperature": 0.7, "do_sample": False, "max_new_tokens": 9}, False, 9),
        ({"temperature": 0.7, "top_p": 0.9, "until": ["\n"]}, True, 5),
        ({"do_sample": True}, True, 5),
        ({"image_aspect_ratio": "original", "top_p": None}, False, 5),
    ],
)
def test_generation_settings(given: Any, drawn: bool, limit: int) -> None:
    chosen = generation(given, 5)
    assert (chosen["do_sample"], chosen["max_new_tokens"], chosen["num_beams"]) == (drawn, limit, 1)
    assert ("temperature" in chosen) == (drawn and "temperature" in given)
    assert not {"until", "image_aspect_ratio"} & set(chosen)


def test_unknown_generation_settings_are_refused_by_name() -> None:
    with pytest.raises(VlmpruneError, match="'visual_cot' is not supported"):
        generation({"visual_cot": "x"}, 5)


def test_several_turns_need_a_chat_template() -> None:
    answerer = Answerer(arguments.read({"device": "cpu"}))
    turns = [("system", "be brief."), ("user", "where is the cat?")]
    asked = conversation([{"role": who, "content": text} for who, text in turns])
    assert "be brief." in answerer.text(asked)
    processor = answerer.loaded.processor
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(
        VlmpruneError, match=r"several turns, but .* processor has no chat template"
    ):
        answerer.text(asked)
    assert "where is the cat?" in answerer.text(
        conversation([{"role": "user", "content": turns[1][1]}])
    )


def test_answers_end_at_the_first_stop() -> None:
    assert cut("\n yes.\n\nno", ["\n\n", "."]) == "yes"
    assert cut(" yes. ", None) == "yes."
    assert cut("a;b", ";") == "a"
    assert cut("a;b;c", ";") == "a"
    assert cut("a, b. c, d. e", [".", ","]) == cut("a, b. c, d. e", [",", "."]) == "a"
    # One that is not there ends nothing, nor does an empty one.
    assert cut("a;b", ["|", ""]) == "a;b"


def test_pictures_in_memory_are_seen_as_files_are(tmp_path: Path) -> None:
    """Harnesses hand over pictures that they opened: 16-bit, clear in places, to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "one.png"
    for made in (Image.new("RGBA", (3, 2)), Image.fromarray(np.full((2, 3), 40000, np.uint16))):
        made.save(path, exif=exif)
        with Image.open(path) as opened:
            parts = [{"type": "image", "url": given} for given in (str(path), opened)]
            one = conversation([{"role": "user", "content": parts}])
        file, memory = one.images
        assert file.size == memory.size == (2, 3)
        # White where nothing is, and the upper 8 of 16 bits.
        white = made.mode == "RGBA"
        assert file.getcolors() == memory.getcolors() == [(6, ((255,) if white else (156,)) * 3)]
    path.write_bytes(path.read_bytes()[:-30])
    with (
        Image.open(path) as opened,
        pytest.raises(VlmpruneError, match=r"a request's picture cannot be opened"),
    ):
        conversation([{"role": "user", "content": [{"type": "image", "url": opened}]}])


def test_messages_become_parts_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.new("L", (3, 2)).save(path)
    one = conversation(
        [
            {"role": "system", "content": "be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": str(path)},
                    {"type": "text", "text": "what?"},
                    {"type": "image", "url": Image.new("RGB", (5, 4))},
                ],
            },
        ]
    )
    assert [image.size for image in one.images] == [(3, 2), (5, 4)]
    assert [image.mode for image in one.images] == ["RGB", "RGB"]
    assert one.messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what?"}, {"type": "image"}],
        },
    ]
    with pytest.raises(VlmpruneError, match="holds 'video'"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    with pytest.raises(VlmpruneError, match="picture is a int"):
        conversation([{"role": "user", "content": [{"type": "image", "url": 3}]}])
