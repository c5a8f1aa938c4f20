"""Copies of the standard sets that are not as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmprune import VlmpruneError
from vlmprune.study.tasks import find_task


def refused(task: str, said: str) -> None:
    with pytest.raises(VlmpruneError, match=said) as told:
        find_task(task).samples()
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Is it 1?\tYes\nIs it 2? Perhaps.\n", r"line 2 of .*9\.txt is no question, tab, and Yes"),
        (b"\tYes\n", r"line 1 of .*9\.txt is no question, tab, and Yes or No"),
        (b"Is it 1?\tMaybe\n", r"line 1 of .*9\.txt is no question, tab, and Yes or No"),
        (b"\xff", r"9\.txt cannot be read .*; download it again"),
    ],
)
def test_mme(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "9.txt").write_bytes(content)
    refused(f"mme:{tmp_path}", said)


ASKED = {"question": "Which is colder?", "choices": ["ice", "steam"], "answer": 0, "image": "a.png"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": -1}, "no choice -1 among the 2 of question 4"),
        ({"answer": 2}, "no choice 2 among the 2 of question 4"),
        ({"choices": ["x"] * 6}, "no choice 0 among the 6 of question 4"),
        ({"choices": None}, "has an entry without a usable 'choices'"),
        ({"answer": True}, "has an entry without a usable 'answer'"),
        ({"question": ["x"]}, "has an entry without a usable 'question'"),
    ],
)
def test_scienceqa(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "problems.json").write_text(json.dumps({"4": ASKED | changes}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["4"]}))
    refused(f"scienceqa:{tmp_path}", said)


@pytest.mark.parametrize("content", [[], ["1"], "text"])
def test_gqa(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text(json.dumps(content))
    refused(f"gqa:{tmp_path}", rf"{path.name} is no object of questions; give it as it is publish")


@pytest.mark.parametrize("content", ["", "[", '{"a": }'])
def test_what_is_no_json(content: str, tmp_path: Path) -> None:
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(content)
    refused(
        f"textvqa:{tmp_path}", rf"{path.name} cannot be read as JSON \(.*; give it as it is pub"
    )


@pytest.mark.parametrize("answers", ["two", [2], [["two"]], None])
def test_textvqa(answers: Any, tmp_path: Path) -> None:
    asked = {"question_id": 1, "image_id": "a", "question": "what number?", "answers": answers}
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": [asked]}))
    refused(f"textvqa:{tmp_path}", rf"{path.name} has an entry without usable 'answers'; give")


def test_vqav2_of_answers_to_other_questions(tmp_path: Path) -> None:
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked = {"question_id": 42007, "image_id": 42, "question": "Who?"}
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": [asked]}))
    answers = tmp_path / "v2_mscoco_val2014_annotations.json"
    told = {"question_id": 42001, "answers": [{"answer": "girl"}]}
    answers.write_text(json.dumps({"annotations": [told]}))
    said = rf"{answers.name} has nothing about question 42007; .* belongs to {questions.name}"
    refused(f"vqav2:{tmp_path}", said)


def test_a_copy_without_questions(tmp_path: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        (tmp_path / f"coco_pope_{split}.json").write_text("\n")
    refused(f"pope:{tmp_path}", "holds no questions; pope:PATH takes a folder with coco_pope")
