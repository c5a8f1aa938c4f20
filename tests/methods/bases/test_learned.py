"""What learned methods build on: states and questions of a host, weights as a folder, LoRA."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from learned_host import fresh, host, logits
from tiny import IMAGE, model, request
from vlmprune import QueCC, VlmpruneError, spec
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.methods.bases.learned import find, shipped
from vlmprune.views import EncoderView, Reads, Selection
from zoo import ZOO

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}


@dataclass(frozen=True)
class Spy(Budgeted):
    """Keeps the first cells, and what it was shown; puts tokens in where it is given some."""

    keep: int | float = 4
    wants: Reads = field(default_factory=Reads)
    seen: list[EncoderView] = field(default_factory=list, repr=False)

    def reads(self, depth: int, feature: int) -> Reads:
        return self.wants

    def select(self, view: EncoderView) -> Selection:
        self.seen.append(view)
        kept = self.each(view, lambda cells, n: torch.arange(n).expand(len(cells), -1))
        return Selection(kept, {})


def look(built: Any, inputs: dict[str, Any], wants: Reads, **more: Any) -> EncoderView:
    spy = Spy(wants=wants)
    with spy(built):
        built(**inputs, **more)
    return spy.seen[-1]


# Hidden states.


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_states_are_the_towers_own(family: str, kind: str) -> None:
    built = model(family, kind=kind)
    req = request(built, [2, 0, 1])
    view = look(built, req.inputs, Reads(states=(0, 1, 2)))
    pixels = req.inputs["pixel_values"]
    if pixels.ndim == 5:
        counts = [view.images.count(i) for i in range(3)]
        pixels = torch.cat([one[:n] for one, n in zip(pixels, counts, strict=True)])
    with torch.no_grad():
        states = built.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    cls = int(kind != "siglip")
    for layer in range(2):
        torch.testing.assert_close(view.states[layer], states[layer + 1][:, cls:], **CLOSE)
        assert (view.states[layer] - states[layer][:, cls:]).abs().max() > 1e-3
    # The layer whose output the model takes.
    assert torch.equal(view.states[1].detach(), view.features)
    # The tower is not frozen, so gradients may reach it.
    assert view.states[2].requires_grad and not view.features.requires_grad


@pytest.mark.parametrize("name", ZOO)
def test_states_and_questions_of_every_family(name: str) -> None:
    """As the host itself reads the same text alone, whatever is padded."""
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"], ["image", "image"]], text=[6, 4])
    with torch.no_grad():
        view = look(built, req.inputs, Reads(states=(0, 1), question=True))
    assert view.question is not None
    for layer in (0, 1):
        assert view.states[layer].shape[:2] == view.candidates.shape
        assert view.states[layer].isfinite().all()
    assert (view.states[0] - view.states[1]).abs().max() > 1e-3
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    assert (view.question[0] - view.question[-1]).abs().max() > 1e-3
    for row, state in ((0, view.question[0]), (1, view.question[-1])):
        own = [t for t, real in zip(ids[row].tolist(), mask[row].tolist(), strict=True) if real]
        last = len(own) - own[::-1].index(built.config.image_token_id)
        text = [own[0]] * (own[0] == 1) + own[last:]
        with torch.no_grad():
            out = built.base_model(input_ids=torch.tensor([text]), output_hidden_states=True)
        torch.testing.assert_close(state, out.hidden_states[-1][0, -1], **CLOSE)


# The question.


def test_the_question_with_left_and_right_padding() -> None:
    built = host()
    wants = Reads(question=True)
    left, right = (request(built, [1, 2, 1], text=[2, 9, 5], side=s) for s in ("left", "right"))
    one, other = (look(built, req.inputs, wants).question for req in (left, right))
    assert one is not None and other is not None and len(one) == 4
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(one[1], one[2]), "both images of a row"
    assert (one[0] - one[1]).abs().max() > 1e-3


def test_answers_are_no_part_of_the_question() -> None:
    """With labels the text ends where the first of them begins; without, it goes on."""
    built = host()
    ids = [1, 9, *[IMAGE] * 16, 20, 21, 22, 40, 41, 50]
    inputs = {"pixel_values": request(built, [1]).inputs["pixel_values"]}

    def state(ids: list[int], labels: list[int] | None = None) -> Tensor:
        more = {} if labels is None else {"labels": torch.tensor([labels])}
        given = {**inputs, "input_ids": torch.tensor([ids])}
        with torch.no_grad():
            question = look(built, given, Reads(question=True), **more).question
        assert question is not None
        return question[0]

    taught = [*[-100] * (len(ids) - 3), 40, 41, -100]
    asked = state(ids[:-3])
    torch.testing.assert_close(state(ids, taught), asked, **CLOSE)
    torch.testing.assert_close(state([*ids[:-3], 30, 31, 32], taught), asked, **CLOSE)
    assert (state(ids) - asked).abs().max() > 1e-3
    # All text where none stands behind the image; none at all is refused.
    alone = state([1, 9, 20, *[IMAGE] * 16])
    torch.testing.assert_close(alone, state([1, *[IMAGE] * 16, 9, 20]), **CLOSE)
    with pytest.raises(VlmpruneError, match="row 0 holds an image and no question"):
        state([IMAGE] * 16)


def test_the_question_has_gradients_and_leaves_no_trace() -> None:
    built = model()
    view = look(built, request(built, [1]).inputs, Reads(question=True))
    assert view.question is not None
    view.question.sum().backward()
    moved = {name for name, weight in built.named_parameters() if weight.grad is not None}
    assert moved and all("language_model" in name for name in moved)
    states = [layer for layer in built.modules() if "Layer" in type(layer).__name__]
    before = [len(layer._forward_hooks) for layer in states]
    look(built, request(built, [1]).inputs, Reads(states=(0, 1), question=True))
    assert [len(layer._forward_hooks) for layer in states] == before


def test_what_is_not_asked_for_is_not_there() -> None:
    view = look(host(), request(host(), [1]).inputs, Reads())
    assert not view.states and view.question is None and view.semantic is None
    with pytest.raises(VlmpruneError, match="reads encoder layers 7, but"):
        look(host(), request(host(), [1]).inputs, Reads(states=(7,)))


# Tokens that are put in.


def test_the_projected_features_as_tokens_change_nothing() -> None:
    """Put in by their cells, over newlines and cut padding; without `tokens` the same bits."""

    @dataclass(frozen=True)
    class Same(Spy):
        put: bool = True

        def select(self, view: EncoderView) -> Selection:
            chosen = super().select(view)
            return Selection(chosen.kept, {}, tokens=view.projected if self.put else None)

    for family in ("llava", "llava_next"):
        built = model(family)
        req = request(built, [2, 1])
        logits = []
        for put in (True, False):
            with torch.no_grad(), Same(keep=5, wants=Reads(projected=True), put=put)(built):
                logits.append(built(**req.inputs).logits)
        assert torch.equal(*logits)


# Weights as a folder.


def test_save_and_load(tmp_path: Path) -> None:
    built = host()
    pruner, req = fresh(built), request(built, [2, 1])
    notes = {"tokens": 4, "command": "vlmprune train quecc"}
    pruner.save_pretrained(tmp_path / "one", notes=notes)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["method"], config["settings"]["window"]) == ("quecc", 3)
    assert config["format"] == "vlmprune learned 1" and config["command"] == notes["command"]
    again = QueCC.from_pretrained(tmp_path / "one")
    assert again == QueCC(str(tmp_path / "one")) == spec.parse(spec.dump(again))
    assert again.keep == 4 and pruner.keep is None
    assert again.fingerprint in repr(again) and not pruner.fingerprint
    want = logits(built, pruner, req.inputs)
    assert torch.equal(logits(built, again, req.inputs), want)
    assert not again.module.training
    # Another draw of the weights makes others; half precision comes near.
    torch.manual_seed(1)
    other = QueCC.fresh(built, window=3, heads=4)
    assert (logits(built, other, req.inputs) - want).abs().max() > 1e-3
    again.save_pretrained(tmp_path / "half", torch.float16)
    half = QueCC(str(tmp_path / "half"), positions="original")
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == config
    for one, two in zip(half.module.parameters(), pruner.module.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        assert one.dtype == torch.float32
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("one", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    # Kept answers of weights that were there before are not taken for those of new ones.
    other.save_pretrained(tmp_path / "one", notes=notes)
    assert repr(QueCC(str(tmp_path / "one"))) != repr(again)


def test_a_fresh_projector_is_the_hosts() -> None:
    built = host()
    features = torch.randn(5, 32)
    with torch.no_grad():
        want = built.model.multi_modal_projector(features)
        assert torch.equal(fresh(built).module.projector(features), want)


def test_other_projectors_are_refused_by_name() -> None:
    built = model()
    projector = built.model.multi_modal_projector
    projector.linear_2 = torch.nn.Sequential(projector.linear_2, torch.nn.Linear(32, 32))
    said = f"two linear layers, but {type(projector).__name__} of {type(built).__name__} is made ot"
    with pytest.raises(VlmpruneError, match=said):
        fresh(built)


def test_shipped_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmprune.methods.bases import learned

    monkeypatch.setattr(learned.embedded, "learned", lambda: tmp_path)
    assert shipped() == []
    fresh(host()).save_pretrained(tmp_path / "some-s3")
    assert shipped("quecc") == ["some-s3"] == shipped() and shipped("mod") == []
    assert find("some-s3", "quecc") == tmp_path / "some-s3"
    assert spec.parse("quecc:weights=some-s3").settings["window"] == 3  # type: ignore[attr-defined]
    with pytest.raises(VlmpruneError, match="has some-s3"):
        QueCC("other")


def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    built = host()
    good = tmp_path / "good"
    fresh(built).save_pretrained(good)

    def changed(name: str, **entries: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    for weights, said in (
        (str(tmp_path / "none"), "is no folder with a config.json; give one as `vlmprune train"),
        ("", "names no weights; give a folder as `vlmprune train quecc` writes it"),
        (7, "weights=7 of quecc names no weights"),
        (
            changed("mod", method="mod"),
            "are of the method 'mod', not of 'quecc'; write mod:weights",
        ),
        (changed("new", format="vlmprune learned 2"), "not of the format 'vlmprune learned 1'"),
        (changed("bare", settings=None), "does not say settings"),
    ):
        with pytest.raises(VlmpruneError, match=said):
            QueCC(weights)  # type: ignore[arg-type]
    broken = Path(changed("broken"), "config.json")
    broken.write_text("{")
    with pytest.raises(VlmpruneError, match=rf"^{broken} cannot be read as JSON \(.*; train it"):
        QueCC(str(broken.parent))
    with pytest.raises(VlmpruneError, match="positions='near' is not known"):
        QueCC(str(good), positions="near")  # type: ignore[arg-type]
    with pytest.raises(VlmpruneError, match="needs weights; write quecc:weights=… with a value"):
        spec.parse("quecc")

    pickled = Path(changed("pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(VlmpruneError, match=r"no model.safetensors, the only kind of weights"):
        QueCC(str(pickled))
    torn = Path(changed("torn"))
    (torn / "model.safetensors").write_bytes(b"nothing")
    wide = changed("wide", settings=json.loads((good / "config.json").read_text())["settings"])
    config = json.loads(Path(wide, "config.json").read_text())
    config["settings"]["hidden"] = 7
    Path(wide, "config.json").write_text(json.dumps(config))
    for folder, said in ((str(torn), "cannot be read"), (wide, "does not fit the settings")):
        with pytest.raises(VlmpruneError, match=said):
            QueCC(folder).attach(built)

    other = model(kind="dinov2")
    with pytest.raises(VlmpruneError) as told:
        QueCC(str(good)).attach(other)
    sentence = str(told.value)
    assert "tower clip_vision_model with 3 layers" in sentence
    assert "tower dinov2 with 3 layers" in sentence and "vlmprune train quecc" in sentence
    # Nothing was left on either model.
    for one in (built, other):
        assert "forward" not in vars(one)


def test_weights_are_parameters_of_a_module() -> None:
    module = fresh(host()).module
    assert isinstance(module, nn.Module) and not module.training
    assert all(weight.requires_grad for weight in module.parameters())


def test_weights_that_cannot_be_written_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(VlmpruneError, match=r"cannot be written .*; give another folder"):
        fresh(host()).save_pretrained(tmp_path / "new")
    assert not [path for path in (tmp_path / "new").iterdir() if path.suffix == ".safetensors"]
