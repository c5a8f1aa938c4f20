"""Local copies of the standard sets, made by hand in their published formats, read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmprune import VlmpruneError
from vlmprune.study.tasks import COPIES, Sample, Task, find_task
from vlmprune.study.tasks.answered import Answered
from vlmprune.study.tasks.part import Part

SHORT = "\nAnswer the question using a single word or phrase."


def picture(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(*objects: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def pope(folder: Path) -> None:
    def asked(number: int, image: str, thing: str, label: str) -> dict[str, Any]:
        text = f"Is there a {thing} in the image?"
        return {"question_id": number, "image": image, "text": text, "label": label}

    for split, thing in (("random", "zebra"), ("popular", "chair"), ("adversarial", "fork")):
        found = [asked(1, "COCO_1.jpg", "dog", "yes"), asked(2, "COCO_2.jpg", thing, "no")]
        write(folder / f"coco_pope_{split}.json", lines(*found))
    for name in ("COCO_1.jpg", "COCO_2.jpg"):
        picture(folder / "val2014" / name)


def gqa(folder: Path) -> None:
    def asked(image: str, question: str, answer: str, kind: str, **more: Any) -> dict[str, Any]:
        types = {"structural": kind, "semantic": "rel", "detailed": "x"}
        content = {"imageId": image, "question": question, "answer": answer, "types": types}
        return content | {"isBalanced": True} | more

    questions = {
        "20": asked("n1", "Who is it?", "girl", "query"),
        "21": asked("n2", "Is it red?", "no", "verify"),
        "22": asked("n1", "Is it a cat?", "yes", "verify"),
        "23": asked("n1", "Which?", "left", "choose", isBalanced=False),
    }
    write(folder / "testdev_balanced_questions.json", questions)
    picture(folder / "images" / "n1.jpg")
    picture(folder / "images" / "n2.jpg")


def textvqa(folder: Path) -> None:
    data = [
        {
            "question_id": 34602,
            "image_id": "003a8ae2ef43b901",
            "question": "what is the brand of this camera?",
            "answers": ["dakota"] * 7 + ["nous les gosses", "dakota digital", "clos culombu"],
            "set_name": "val",
        },
        {
            "question_id": 34603,
            "image_id": "005635e119b9f32f",
            "question": "what number?",
            "answers": ["two"] * 10,
            "set_name": "val",
        },
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    for one in data:
        picture(folder / "train_images" / f"{one['image_id']}.jpg")


def scienceqa(folder: Path) -> None:
    def asked(image: str | None, answer: int, hint: str, subject: str) -> dict[str, Any]:
        content = {"question": "Which is colder?", "choices": ["ice", "steam"], "answer": answer}
        return content | {"hint": hint, "image": image, "subject": subject, "split": "test"}

    problems = {
        "4": asked("image.png", 0, "Look at both.", "natural science"),
        "5": asked(None, 1, "", "language science"),
        "11": asked("image.png", 1, "", "social science"),
        "12": asked("image.png", 1, "", "social science"),
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["12"], "test": ["4", "5", "11"]})
    for key in ("4", "11"):
        picture(folder / "images" / "test" / key / "image.png")


def mme(folder: Path) -> None:
    def asked(answers: str) -> str:
        return "".join(
            f"Is it {i}? Please answer yes or no.\t{answer}\n"
            for i, answer in enumerate(answers.split())
        )

    count = folder / "count"
    for name, answers in (("000001", "Yes No"), ("000002", "No Yes")):
        write(count / f"{name}.txt", asked(answers))
        picture(count / f"{name}.jpg")
    write(folder / "artwork" / "questions_answers_YN" / "9.txt", asked("Yes No"))
    picture(folder / "artwork" / "images" / "9.png")
    write(folder / "code_reasoning" / "0020.txt", asked("No Yes"))
    picture(folder / "code_reasoning" / "0020.png")


def vqav2(folder: Path) -> None:
    def asked(key: int, image: int, text: str) -> dict[str, Any]:
        return {"question_id": key, "image_id": image, "question": text}

    def told(key: int, kind: str, *answers: str) -> dict[str, Any]:
        people = [{"answer": a, "answer_id": i + 1} for i, a in enumerate(answers)]
        about = {"question_id": key, "answer_type": kind, "question_type": "what", "image_id": 42}
        return about | {"answers": people, "multiple_choice_answer": answers[0]}

    questions = [
        asked(42000, 42, "Is it red?"),
        asked(73000, 73, "What?"),
        asked(42001, 42, "Who?"),
    ]
    write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": questions},
    )
    annotations = [
        told(42000, "yes/no", *["yes"] * 10),
        told(73000, "other", *["net"] * 2, *["a racket"] * 8),
        told(42001, "other", *["girl"] * 3, *["woman"] * 7),
    ]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    for image in (42, 73):
        picture(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg")


MAKERS: dict[str, Callable[[Path], None]] = {
    "pope": pope,
    "gqa": gqa,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "mme": mme,
    "vqav2": vqav2,
}


@pytest.fixture(params=list(MAKERS))
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    MAKERS[request.param](tmp_path)
    return request.param, tmp_path


def told(samples: list[Sample]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(one.id, one.group, one.kind, one.answers) for one in samples]


def score(task: Task, samples: list[Sample], *answers: str) -> list[Answered]:
    """Results as an evaluation has them."""
    assert len(samples) == len(answers)
    return [
        Answered(one.id, one.group, one.kind, text, task.score(one, text), *[1.0] * 9)
        for one, text in zip(samples, answers, strict=True)
    ]


def test_there_is_one_of_each() -> None:
    assert list(COPIES) == list(MAKERS)


def test_pope(tmp_path: Path) -> None:
    pope(tmp_path)
    task = find_task(f"pope:{tmp_path}")
    assert task.label == f"pope:{tmp_path}"
    samples = task.samples()
    splits = ("random", "popular", "adversarial")
    assert told(samples) == [
        *((f"{split}-1", "COCO_1.jpg", split, ("yes",)) for split in splits),
        *((f"{split}-2", "COCO_2.jpg", split, ("no",)) for split in splits),
    ]
    assert samples[3].question == "Is there a zebra in the image?" + SHORT
    results = score(task, samples, "Yes", "No", "Yes, a dog.", "yes", "No", "There is not.")
    assert [one.score for one in results] == [1, 0, 1, 0, 1, 1]
    # By split: hit and false alarm; a miss and a no; a hit and a no.
    assert task.summary(results) == pytest.approx(
        {
            "accuracy %, mean of splits": 100 * (1 / 2 + 1 / 2 + 1) / 3,
            "precision %, mean of splits": 100 * (1 / 2 + 0 + 1) / 3,
            "recall %, mean of splits": 100 * (1 + 0 + 1) / 3,
            "F1 %, mean of splits": 100 * (2 / 3 + 0 + 1) / 3,
            "yes ratio %, mean of splits": 100 * (1 + 0 + 1 / 2) / 3,
            "F1 %, random": 200 / 3,
            "F1 %, popular": 0,
            "F1 %, adversarial": 100,
        }
    )
    assert task.summary([]) == {}

    # One split by its file, and a copy that holds its files in a folder of their own.
    one = find_task(f"pope:{tmp_path / 'coco_pope_popular.json'}")
    assert [sample.kind for sample in one.samples()] == ["popular"] * 2
    assert one.summary(score(one, one.samples(), "Yes", "No"))["F1 %"] == 100
    inner = tmp_path / "coco"
    inner.mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(inner / path.name)
    assert told(find_task(f"pope:{tmp_path}").samples()) == told(samples)
    assert told(find_task(f"pope:{inner}").samples()) == told(samples)


def test_gqa(tmp_path: Path) -> None:
    gqa(tmp_path)
    task = find_task(f"gqa:{tmp_path}")
    samples = task.samples()
    assert told(samples) == [
        ("20", "n1", "query", ("girl",)),
        ("22", "n1", "verify", ("yes",)),
        ("21", "n2", "verify", ("no",)),
    ]
    assert samples[2].question == "Is it red?" + SHORT
    results = score(task, samples, "Girl.", "Yes", "Yes, it is")
    assert [one.score for one in results] == [1, 1, 0]
    assert task.summary(results) == {"open %": 100, "binary %": 50}
    assert Part(task, odd=True).summary(results) == task.summary(results)


def test_textvqa(tmp_path: Path) -> None:
    textvqa(tmp_path)
    task = find_task(f"textvqa:{tmp_path}")
    samples = task.samples()
    assert [one.id for one in samples] == ["34602", "34603"]
    assert samples[0].question == "what is the brand of this camera?" + SHORT
    assert len(samples[0].answers) == 10
    results = score(task, samples, "Dakota.", "2")
    assert [one.score for one in results] == [1, 1]
    assert task.score(samples[0], "Dakota Digital") == pytest.approx(0.3)


def test_scienceqa(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    task = find_task(f"scienceqa:{tmp_path}")
    samples = task.samples()
    assert told(samples) == [
        ("4", "4/image.png", "natural science", ("A",)),
        ("11", "11/image.png", "social science", ("B",)),
    ]
    assert samples[0].question == (
        "Context: Look at both.\nWhich is colder?\nA. ice\nB. steam\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert samples[1].question.startswith("Which is colder?\nA. ice")
    assert [one.score for one in score(task, samples, "A. ice", "ice")] == [1, 0]


@pytest.mark.parametrize("root", ["", "MME_Benchmark_release_version/MME_Benchmark"])
def test_mme(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mme(tmp_path / "a" / root)
    monkeypatch.chdir(tmp_path)
    task = find_task("mme:a")
    samples = task.samples()
    assert told(samples) == [
        ("count/000001-0", "count/000001", "count", ("yes",)),
        ("count/000001-1", "count/000001", "count", ("no",)),
        ("count/000002-0", "count/000002", "count", ("no",)),
        ("count/000002-1", "count/000002", "count", ("yes",)),
        ("artwork/9-0", "artwork/9", "artwork", ("yes",)),
        ("artwork/9-1", "artwork/9", "artwork", ("no",)),
        ("code_reasoning/0020-0", "code_reasoning/0020", "code_reasoning", ("no",)),
        ("code_reasoning/0020-1", "code_reasoning/0020", "code_reasoning", ("yes",)),
    ]
    assert samples[0].question == "Is it 0?" + SHORT
    answers = ("Yes", "No", "Yes", "yes.", "Yes", "I do not know", "no", "Yes")
    results = score(task, samples, *answers)
    # Counting: three of four right, one of two pictures; art: one of two and no picture.
    assert task.summary(results) == {
        "perception": 75 + 50 + 50 + 0,
        "cognition": 200,
        "total": 375,
        "count": 125,
        "artwork": 50,
        "code_reasoning": 200,
    }
    # The second picture of three results has one question and counts for no pair.
    assert task.summary(results[:3])["count"] == pytest.approx(100 * (2 / 3 + 1))


def test_vqav2(tmp_path: Path) -> None:
    vqav2(tmp_path)
    task = find_task(f"vqav2:{tmp_path}")
    samples = task.samples()
    first, second = (f"COCO_val2014_{image:012d}.jpg" for image in (42, 73))
    assert [one[:3] for one in told(samples)] == [
        ("42000", first, "yes/no"),
        ("42001", first, "other"),
        ("73000", second, "other"),
    ]
    assert samples[0].question == "Is it red?" + SHORT
    results = score(task, samples, "Yes.", "Girl", "Racket")
    assert [one.score for one in results] == pytest.approx([1, 0.9, 1])

    # A test set has no answers.
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(VlmpruneError, match=r"no v2_mscoco_val2014_annotations.json beside it"):
        task.samples()
    content = json.loads((tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    other = tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    write(other, content | {"data_subtype": "test-dev2015"})
    for path in (tmp_path / "val2014").iterdir():
        picture(tmp_path / "test2015" / path.name.replace("val2014", "test2015"))
    bare = find_task(f"vqav2:{other}").samples()
    assert [(one.id, one.answers) for one in bare] == [("42000", ()), ("42001", ()), ("73000", ())]


def test_every_copy_is_read_as_any_task(copy: tuple[str, Path]) -> None:
    name, folder = copy
    task = find_task(f"{name}:{folder}")
    samples = task.samples()
    assert task.samples(1) == samples[:1]
    assert len({one.id for one in samples}) == len(samples) > 1
    groups = [one.group for one in samples]
    assert [g for i, g in enumerate(groups) if g not in groups[:i]] == [
        g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g
    ]
    for one in samples:
        assert [image.size for image in one.opened()] == [(4, 4)]
        assert task.max_new_tokens(one) == 16
        assert 0 <= task.score(one, "nothing of the kind") <= 1
    files = task.read_from()
    assert files and all(path.is_file() for path in files)


def test_a_missing_picture_is_told_unless_a_limit_leaves_it_out(copy: tuple[str, Path]) -> None:
    name, folder = copy
    task = find_task(f"{name}:{folder}")
    last = task.samples()[-1].images[0]
    assert isinstance(last, Path)
    last.unlink()
    assert len(task.samples(1)) == 1
    with pytest.raises(VlmpruneError, match=r"is about .* which is not there; .*:PATH takes"):
        task.samples()


def test_an_empty_folder_is_told_what_it_lacks(copy: tuple[str, Path], tmp_path: Path) -> None:
    name, _ = copy
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VlmpruneError, match=f"no copy of {name}; {name}:PATH takes a folder with"):
        find_task(f"{name}:{empty}").samples()
    with pytest.raises(VlmpruneError, match=f"does not exist; {name}:PATH takes a folder with"):
        find_task(f"{name}:{tmp_path / 'none'}")
    with pytest.raises(VlmpruneError, match="is unknown; use scenes"):
        find_task(f"{name}:")


@pytest.mark.parametrize("content", ["[", "[1]", "{}", '{"1": {}}', '"text"'])
def test_a_broken_file_is_one_sentence(copy: tuple[str, Path], content: str) -> None:
    name, folder = copy
    task = find_task(f"{name}:{folder}")
    files = task.read_from()
    assert files
    write(files[-1], content)
    if name == "scienceqa":
        write(files[0], content)
    with pytest.raises(VlmpruneError) as caught:
        task.samples()
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and os.fspath(folder) in said


def test_a_question_that_comes_twice_is_refused(tmp_path: Path) -> None:
    pope(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    path.write_text(path.read_text() * 2)
    with pytest.raises(VlmpruneError, match="has question random-1 twice"):
        find_task(f"pope:{tmp_path}").samples()
