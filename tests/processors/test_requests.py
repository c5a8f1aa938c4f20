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
from family_processors import backends, inputs_of, processor_of, question, served
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
    """Whether a family's processor makes such a batch; those of videos alone only of few."""
    made, kinds = MADE[family], {kind for row in BATCHES[batch] for kind in row}
    if "video" in kinds and not made.video_mark:
        return False
    return batch != ("mixed" if made.apart else "videos")


CASES = [
    pytest.param(
        family,
        backend,
        batch,
        marks=pytest.mark.skipif(not served(family, backend), reason="needs torchvision"),
    )
    for family in MADE
    if family in FAMILIES
    for backend in backends(family)
    for batch in BATCHES
    if makes(family, batch)
]


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
        told = {"fps": RATE, "total_num_frames": FRAMES, "duration": FRAMES / RATE}
        given |= {"videos": videos, "video_metadata": [dict(told) for _ in videos]}
    text = [question(family, row, number) for number, row in enumerate(rows)]
    processor = processor_of(family, backend)
    made = processor(text=text, **given, padding=True, return_tensors="pt")
    return Request(inputs_of(processor, made), [], [], [], [])


@pytest.mark.parametrize(("family", "backend", "batch"), CASES)
def test_a_processed_request_equals_masking(family: str, backend: str, batch: str) -> None:
    built = FAMILIES[family].build()
    req = request(family, backend, BATCHES[batch])
    plain = generate(built, req.inputs)
    with pruner(family, 1.0)(built):
        same = generate(built, req.inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    with pruner(family, 0.4)(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None
    # Where nothing says what an image is cut into, each tile is told as one.
    kinds = [kind for row in BATCHES[batch] for kind in row]
    if MADE[family].frames:
        kinds = ["image"] * len(kinds)
    assert {layout.kind for layout in report.layouts} == set(kinds)
    assert len(report.layouts) >= len(kinds)
    policy = report.positions.split()[0]
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < tolerance(built)
    control = masked(built, req, dropped_columns(req, report, others(report)), policy)
    assert distance(pruned, control) > DIFFERENT


TEMPLATE = (
    "{% for message in messages %}w0 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }} {% elif part['type'] == 'video' %}{{ VIDEO }} "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}w1 {% endfor %}"
)


@pytest.mark.parametrize(
    ("family", "backend"), dict.fromkeys(tuple(one.values[:2]) for one in CASES)
)
def test_the_chat_template_makes_a_request_too(family: str, backend: str) -> None:
    if not served(family, backend):
        pytest.skip("needs torchvision")
    made = MADE[family]
    built, processor = FAMILIES[family].build(), processor_of(family, backend)  # type: ignore[arg-type]
    processor.chat_template = TEMPLATE.replace("{{ IMAGE }}", made.mark).replace(
        "{{ VIDEO }}", made.video_mark
    )
    content = [{"type": "image", "image": one} for one in pictures(2)]
    message = {"role": "user", "content": [*content, {"type": "text", "text": "w5 w6"}]}
    given = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    inputs = inputs_of(processor, given)
    req = Request(inputs, [], [], [], [])
    with pruner(family, 0.4)(built) as handle:
        pruned = generate(built, inputs)
    report = handle.report
    assert report is not None and len(report.layouts) >= 2
    policy = report.positions.split()[0]
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert distance(pruned, expected) < tolerance(built)
    control = masked(built, req, dropped_columns(req, report, others(report)), policy)
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("glm")])
def test_images_beside_videos_are_refused_where_both_have_one_placeholder(family: str) -> None:
    if not served(family, "torchvision"):
        pytest.skip("needs torchvision")
    built, req = FAMILIES[family].build(), request(family, "torchvision", BATCHES["mixed"])
    with (
        VisPruner(keep=0.4)(built),
        pytest.raises(VlmpruneError, match="one placeholder for images and videos"),
    ):
        generate(built, req.inputs)
