"""Requests that the families' own processors make are pruned as those of the zoo: as masking.

`make test-processors` runs all of it, with torchvision; without, what PIL serves alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from answers import DIFFERENT, distance, generate
from family_processors import Backend, backends, inputs_of, processor_of, question, served
from made_processors import ABSENT, MADE
from shortened import tolerance
from vlmprune import DivPrune, Pruner, VisPruner, VlmpruneError
from zoo import FILES, UNATTENDED, ZOO, Request
from zoo_oracle import dropped_columns, masked, others

pytestmark = [
    pytest.mark.oracle,
    # PaliGemma's processor makes labels of tensors as NumPy takes them no longer.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SIZES = [(100, 70), (64, 130), (90, 90)]  # (height, width)
FRAMES, RATE = 9, 9
FAMILIES = ZOO | UNATTENDED
BATCHES: dict[str, list[list[str]]] = {
    "one image": [["image"]],
    "several images": [["image", "image", "image"]],
    "padded batch": [["image", "image"], ["image"]],
    "one video": [["video"]],
    "mixed": [["video", "image"], ["image"]],
    "videos": [["video", "video"], ["video"]],
}


def makes(family: str, batch: str) -> bool:
    """Whether a family's processor makes such a batch: the mixed one or, if none can be, videos."""
    made, kinds = MADE[family], {kind for row in BATCHES[batch] for kind in row}
    if "video" in kinds and not made.video_mark:
        return False
    return batch != ("mixed" if made.apart else "videos")


def case(family: str, backend: Backend, *more: str) -> Any:
    """A case of a test, skipped where this environment cannot build the processor."""
    skip = pytest.mark.skipif(
        not served(family, backend), reason="needs what `make test-processors` installs"
    )
    return pytest.param(family, backend, *more, marks=skip)


BUILT = [(family, backend) for family in MADE if family in FAMILIES for backend in backends(family)]
CASES = [case(*one, batch) for one in BUILT for batch in BATCHES if makes(one[0], batch)]
CHATS = [
    case(family, backend, kind)
    for family, backend in BUILT
    for kind in ("image", "video")
    if kind == "image" or MADE[family].video_mark
]
FILMS = [case(*one) for one in BUILT if one[1] == "torchvision" and MADE[one[0]].video_mark]
APART = [case(name, "torchvision") for name, entry in FAMILIES.items() if entry.one_placeholder]


def pruner(family: str, keep: float) -> Pruner:
    """By attention, or by features where nothing attends in the tower."""
    return VisPruner(keep=keep) if FAMILIES[family].attends else DivPrune(keep=keep)


def test_every_family_has_a_processor_or_says_why_not() -> None:
    names = {name for file in FILES.values() for name in file.FAMILIES}
    assert not set(MADE) & set(ABSENT)
    assert set(MADE) | set(ABSENT) == names


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    return [Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def films(count: int) -> list[np.ndarray]:
    """Of one size, as some processors stack them; all but a few frames are left out."""
    noise = np.random.default_rng(1)
    return [noise.integers(0, 256, (FRAMES, 60, 80, 3), dtype=np.uint8) for _ in range(count)]


def told() -> dict[str, Any]:
    """What a processor is told of a film."""
    return {"fps": RATE, "total_num_frames": FRAMES, "duration": FRAMES / RATE}


def request(family: str, backend: Any, rows: list[list[str]]) -> Request:
    """A batch as the processor makes it: pictures and films by row, with a question each."""
    kinds = [kind for row in rows for kind in row]
    images, videos = pictures(kinds.count("image")), films(kinds.count("video"))
    left = iter(images)
    given: dict[str, Any] = {}
    if images:
        given["images"] = [[next(left) for kind in row if kind == "image"] for row in rows]
        given["images"] = [row for row in given["images"] if row]
    if videos:
        given |= {"videos": videos, "video_metadata": [told() for _ in videos]}
    text = [question(family, row, number) for number, row in enumerate(rows)]
    processor = processor_of(family, backend)
    made = processor(text=text, **given, padding=True, return_tensors="pt")
    return Request(inputs_of(processor, made), [], [], [], [])


def check_pruned_as_masked(family: str, built: Any, req: Request, kinds: list[str]) -> None:
    """Answers equal masking; `kinds` are the images and videos that are asked about."""
    with pruner(family, 0.4)(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None
    # Where nothing says what an image is cut into, each tile is told as one.
    told_as = ["image"] * len(kinds) if MADE[family].frames else kinds
    assert {layout.kind for layout in report.layouts} == set(told_as)
    assert len(report.layouts) >= len(kinds)
    policy = report.positions.split()[0]
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < tolerance(built)
    control = masked(built, req, dropped_columns(req, report, others(report)), policy)
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize(("family", "backend", "batch"), CASES)
def test_a_processed_request_equals_masking(family: str, backend: str, batch: str) -> None:
    built, rows = FAMILIES[family].build(), BATCHES[batch]
    req = request(family, backend, rows)
    plain = generate(built, req.inputs)
    with pruner(family, 1.0)(built):
        same = generate(built, req.inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    check_pruned_as_masked(family, built, req, [kind for row in rows for kind in row])


TEMPLATE = (
    "{% for message in messages %}w0 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }} {% elif part['type'] == 'video' %}{{ VIDEO }} "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}w1 {% endfor %}"
)


@pytest.mark.parametrize(("family", "backend", "kind"), CHATS)
def test_the_chat_template_makes_a_request_too(family: str, backend: Any, kind: str) -> None:
    made = MADE[family]
    processor = processor_of(family, backend)
    processor.chat_template = TEMPLATE.replace("{{ IMAGE }}", made.mark).replace(
        "{{ VIDEO }}", made.video_mark
    )
    shown: list[Any] = pictures(2) if kind == "image" else films(1)
    content = [{"type": kind, kind: one} for one in shown]
    message = {"role": "user", "content": [*content, {"type": "text", "text": "w5 w6"}]}
    more = {"processor_kwargs": {"video_metadata": [told()]}} if kind == "video" else {}
    given = processor.apply_chat_template(
        [message],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        **more,
    )
    req = Request(inputs_of(processor, given), [], [], [], [])
    check_pruned_as_masked(family, FAMILIES[family].build(), req, [kind] * len(shown))


@pytest.mark.parametrize(("family", "backend"), FILMS)
def test_some_frames_of_a_film_are_left_out(
    family: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = type(processor_of(family, backend).video_processor)
    plain, seen = cls.sample_frames, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(plain(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(cls, "sample_frames", watched)
    request(family, backend, [["video"]])
    (frames,) = seen
    assert 1 < len(set(map(int, frames))) < FRAMES


@pytest.mark.parametrize(("family", "backend"), APART)
def test_images_beside_videos_are_refused_where_both_have_one_placeholder(
    family: str, backend: str
) -> None:
    built, req = FAMILIES[family].build(), request(family, backend, BATCHES["mixed"])
    with (
        VisPruner(keep=0.4)(built),
        pytest.raises(VlmpruneError, match="one placeholder for images and videos"),
    ):
        generate(built, req.inputs)
