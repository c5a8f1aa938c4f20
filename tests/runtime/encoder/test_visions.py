"""One image, many questions: encode once, and give what was kept to later requests."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from answers import distance, generate
from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import PLPHP, Vision, VisPruner, VlmpruneError
from zoo_oracle import KNOWN

pytestmark = pytest.mark.oracle

PIXELS = ("pixel_values", "pixel_values_videos")


def later(inputs: dict[str, Any], ids: Any = None) -> dict[str, Any]:
    """A request without pixels."""
    return {k: v for k, v in inputs.items() if k not in PIXELS}


@pytest.mark.parametrize("name", list(KNOWN))
def test_equal_to_encoding_again(name: str, tmp_path: Path) -> None:
    entry = KNOWN[name]
    built = entry.build()
    rows: list[list[Any]] = [["image", "image"], ["image"]]
    if "video" in entry.modalities:
        rows = [["video", "image"], ["image"]]
    req = entry.request(built, rows)
    encoded = []
    with VisPruner(keep=0.4)(built) as handle:
        wanted = generate(built, req.inputs)
        report = handle.report
        vision = handle.encode(**req.inputs)
        vision.save(tmp_path / "seen.safetensors")
        loaded = Vision.load(tmp_path / "seen.safetensors")
        tower = handle.family.media[0].projector(built)
        hook = tower.register_forward_pre_hook(lambda *_: encoded.append(1))
        for one in (vision, loaded):
            again = generate(built, later(req.inputs) | {"vision": one})
            assert all(torch.equal(a, b) for a, b in zip(wanted.logits, again.logits, strict=True))
            assert handle.report is not None and report is not None
            assert handle.report.as_dict() | {"seconds_selecting": 0} == report.as_dict() | {
                "seconds_selecting": 0
            }
        # Pixels may stay where they are; nobody looks.
        same = generate(built, req.inputs | {"vision": vision})
        assert torch.equal(same.logits[0], wanted.logits[0])
        assert not encoded
        hook.remove()
        with torch.no_grad():
            direct = built(**req.inputs).logits
            assert torch.equal(built(**later(req.inputs), vision=loaded).logits, direct)
    stored = (tmp_path / "seen.safetensors").stat().st_size
    assert vision.nbytes <= stored < vision.nbytes + 16000
    assert len(vision) == len(report.layouts)


def test_one_image_serves_a_batch_of_questions() -> None:
    built = model()
    one, many = request(built, [1]), request(built, [1, 1, 1], text=[3, 7, 5])
    many.inputs["pixel_values"] = one.inputs["pixel_values"].repeat(3, 1, 1, 1)
    for pruner in (VisPruner(keep=5), VisPruner(keep=9) | PLPHP(alpha=0.5, beta=0.4)):
        with pruner(built) as handle:
            wanted = generate(built, many.inputs)
            vision = handle.encode(**one.inputs)
            stored = later(many.inputs) | {"vision": vision * 3}
            assert distance(generate(built, stored), wanted) < 1e-5
            # One by one, too: padding is what differs.
            third = {k: v[2:] for k, v in later(many.inputs).items()}
            alone = generate(built, third | {"vision": vision})
            assert float((alone.logits[0] - wanted.logits[0][2:]).abs().max()) < 1e-5
            beams = {"num_beams": 2, "num_return_sequences": 2}
            assert torch.equal(
                generate(built, stored, **beams).sequences,
                generate(built, many.inputs, **beams).sequences,
            )


def test_a_later_turn_may_bring_a_stored_image() -> None:
    built = model()
    one, two = request(built, [1]), request(built, [1], seed=5)
    with VisPruner(keep=5)(built) as handle:
        turn = generate(built, one.inputs)
        ids = torch.cat((turn.sequences, two.inputs["input_ids"]), 1)
        vision = handle.encode(**two.inputs)
        inputs = {"input_ids": ids, CACHE: cache_of(turn)}
        stored = generate(built, inputs | {"vision": vision})
        turn = generate(built, one.inputs)
        inputs[CACHE] = cache_of(turn)
        direct = generate(built, inputs | {"pixel_values": two.inputs["pixel_values"]})
    assert all(torch.equal(a, b) for a, b in zip(stored.logits, direct.logits, strict=True))


def test_joined_and_repeated() -> None:
    built = model()
    first, second = request(built, [1]), request(built, [1], seed=9)
    both = request(built, [1, 1])
    both.inputs["pixel_values"] = torch.cat(
        (first.inputs["pixel_values"], second.inputs["pixel_values"])
    )
    with VisPruner(keep=5)(built) as handle:
        joined = handle.encode(**first.inputs) + handle.encode(**second.inputs)
        wanted = generate(built, both.inputs)
        assert distance(generate(built, later(both.inputs) | {"vision": joined}), wanted) < 1e-5
        swapped = handle.encode(**second.inputs) + handle.encode(**first.inputs)
        assert distance(generate(built, later(both.inputs) | {"vision": swapped}), wanted) > 1e-3


def test_refusals(tmp_path: Path) -> None:
    built = model()
    req, text = request(built, [1]), request(built, [0])
    with VisPruner(keep=5)(built) as handle:
        vision = handle.encode(**req.inputs)
        with pytest.raises(VlmpruneError, match="16 image placeholders but the images make 32"):
            built.generate(**later(req.inputs), vision=vision * 2)
        with pytest.raises(VlmpruneError, match="there is no image or video to encode"):
            handle.encode(**text.inputs)
        with pytest.raises(VlmpruneError, match="vision=Tensor is not what"):
            built.generate(**later(req.inputs), vision=torch.zeros(1))
    with (
        VisPruner(keep=6)(built) as handle,
        pytest.raises(VlmpruneError, match="with another method"),
    ):
        built.generate(**later(req.inputs), vision=vision)
    with VisPruner(keep=6)(built) as handle, pytest.raises(VlmpruneError, match="cannot be joined"):
        vision + handle.encode(**req.inputs)
    with PLPHP()(built) as handle, pytest.raises(VlmpruneError, match="nothing to store"):
        handle.encode(**req.inputs)

    class Asking(VisPruner):
        text_agnostic = False

    with (
        Asking(keep=5)(built) as handle,
        pytest.raises(VlmpruneError, match="looks at the question"),
    ):
        handle.encode(**req.inputs)
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(VlmpruneError, match="cannot be read as a stored vision"):
        Vision.load(path)


def test_a_disk_without_room_for_a_vision_is_told(tmp_path: Path) -> None:
    """The writer of safetensors says so in a way of its own."""
    built = model()
    with VisPruner(keep=5)(built) as handle:
        vision = handle.encode(**request(built, [1]).inputs)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    path = tmp_path / "vision.safetensors"
    try:
        with pytest.raises(VlmpruneError) as told:
            vision.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(told.value)
    assert said.startswith(f"{str(path)!r} cannot be written (") and "give another path" in said
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_holds_no_vision(tmp_path: Path) -> None:
    """Nor does one that an earlier version wrote."""
    built = model()
    with VisPruner(keep=6)(built) as handle:
        handle.encode(**request(built, [1]).inputs).save(tmp_path / "seen.safetensors")
    with safe_open(str(tmp_path / "seen.safetensors"), framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for other in ({}, about | {"format": "vlmprune vision 0"}):
        save_file(tensors, tmp_path / "other.safetensors", other)
        with pytest.raises(VlmpruneError, match="holds no stored vision of this version; encode"):
            Vision.load(tmp_path / "other.safetensors")
