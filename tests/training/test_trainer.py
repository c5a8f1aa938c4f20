"""Training runs: the loss falls, what is frozen stays, and a killed run comes to the same."""

from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from vlmprune.learned import MoD, QueCC, VisToG

from repository import ROOT
from training_data import SIDE, entries, run
from vlmprune import EViT, ToMe, VisionZip, embedded
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import contract
from vlmprune.io.models import Loaded
from vlmprune.io.processors import scale
from vlmprune.training import curve
from vlmprune.training.draws import Drawn
from vlmprune.training.learner import Learner
from vlmprune.training.rows import RowMaker
from vlmprune.training.start import Wanted, build, check, finish
from vlmprune.training.states import States
from vlmprune.training.trainer import CHECKPOINTS, Collator, TrainingSettings, last_checkpoint
from zoo import ZOO


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    found = Loaded(*embedded.load())
    scale(found.processor, SIDE)
    return found


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def batch_of(loaded: Loaded, folder: Path, states: States | None = None) -> dict[str, Tensor]:
    """Two scenes, three turns."""
    some = entries(folder)[:2]
    rows = RowMaker(loaded.processor)
    return Collator(rows, states)([Drawn(some[0], (0, 2)), Drawn(some[1], (1,))])


def test_the_loss_falls_on_a_fixed_batch_and_what_is_frozen_stays(
    loaded: Loaded, tmp_path: Path
) -> None:
    pruner = QueCC.fresh(loaded.model, window=2, hidden=16)
    learner = Learner(loaded.model, pruner)
    before, own = weights(loaded.model), weights(pruner.module)
    batch = batch_of(loaded, tmp_path)
    optimizer = torch.optim.AdamW(learner.trained().values(), lr=3e-3)
    losses = []
    with learner.attached():
        for _ in range(12):
            loss = learner(**batch)["loss"]
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    for name, value in loaded.model.named_parameters():
        assert value.grad is None and torch.equal(value, before[name]), name
    moved = [name for name, value in pruner.module.named_parameters() if (value != own[name]).any()]
    assert moved == list(own)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_is_trained(loaded: Loaded) -> None:
    """The method's own parameters and, with a LoRA, its A and B: nothing else has gradients."""
    from peft import LoraConfig, get_peft_model

    pruner = QueCC.fresh(loaded.model, window=2, hidden=16)
    learner = Learner(loaded.model, pruner)
    names = [name for name, one in learner.named_parameters() if one.requires_grad]
    assert names == [f"learned.{name}" for name, _ in pruner.module.named_parameters()]
    part = Learner(loaded.model, pruner, ["projector.linear_1.weight"])
    assert list(part.trained()) == ["projector.linear_1.weight"]
    peft = get_peft_model(
        loaded.model, LoraConfig(r=2, target_modules=r".*language_model.*(q|down)_proj")
    )
    learner = Learner(loaded.model, pruner, peft=peft)
    assert len(learner.lora()) == 2 * 2 * 5
    assert all("language_model" in name and "lora_" in name for name in learner.lora())
    trained = {name for name, one in learner.named_parameters() if one.requires_grad}
    own = {f"learned.{name}" for name, _ in pruner.module.named_parameters()}
    assert trained == {f"host.{name}" for name in learner.lora()} | own
    peft.unload()
    vars(loaded.model).pop("peft_config", None)


@pytest.mark.parametrize(
    ("method", "hyper"),
    [(QueCC, {"window": 2, "hidden": 16}), (VisToG, {"tokens": 4}), (MoD, {"keep": 0.5})],
)
def test_the_loss_is_that_of_ordinary_calls(
    loaded: Loaded, tmp_path: Path, method: Any, hyper: dict[str, Any]
) -> None:
    """Rows that share a picture have the loss, and give the gradients, that they have apart."""
    pruner = method.fresh(loaded.model, **hyper)
    learner = Learner(loaded.model, pruner)
    some = entries(tmp_path)[:2]
    rows = RowMaker(loaded.processor)
    passes: list[int] = []
    tower = loaded.model.model.vision_tower
    hook = tower.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    # The contract's own runs of the tower, once an attachment, aside.
    with contract.switched_off(), learner.attached():
        together = learner(**batch_of(loaded, tmp_path))["loss"]
        together.backward()
    hook.remove()
    # What does not look at the question before the language model encodes each picture once.
    assert sum(passes) == (2 if method is VisToG else 3)
    first = {name: one.grad.clone() for name, one in learner.trained().items()}
    learner.zero_grad()
    losses, counts = [], []
    with learner.attached():
        for entry, number in ((some[0], 0), (some[0], 2), (some[1], 1)):
            one = rows.batch([entry], [(number,)]) | rows.pixels([entry])
            counts.append(int((one["labels"] != -100).sum()))
            losses.append(loaded.model(**one, use_cache=False).loss * counts[-1])
        apart = torch.stack(losses).sum() / sum(counts)
        apart.backward()
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)
    for name, one in learner.trained().items():
        assert torch.allclose(one.grad, first[name], rtol=1e-3, atol=1e-5), name
    assert all(bool(one.any()) for one in first.values())


def test_answers_may_count_alike(loaded: Loaded, tmp_path: Path) -> None:
    """The mean of the rows' own losses; the model has its own loss back after it."""
    pruner = QueCC.fresh(loaded.model, window=2, hidden=16)
    batch = batch_of(loaded, tmp_path)
    lengths = (batch["labels"] != -100).sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    rows = RowMaker(loaded.processor)
    some = entries(tmp_path)[:2]
    with torch.no_grad():
        alike = Learner(loaded.model, pruner, weigh="answer")
        with alike.attached():
            loss = alike(**batch)["loss"]
        assert "_loss_function" not in vars(loaded.model)
        plain = Learner(loaded.model, pruner)
        with plain.attached():
            other, total = plain(**batch)["loss"], 0.0
            for entry, number in ((some[0], 0), (some[0], 2), (some[1], 1)):
                one = rows.batch([entry], [(number,)]) | rows.pixels([entry])
                total += float(loaded.model(**one, use_cache=False).loss)
    assert float(loss) == pytest.approx(total / 3, rel=1e-5)
    assert abs(float(loss) - float(other)) > 1e-3


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    loaded: Loaded, tmp_path: Path
) -> None:
    some = entries(tmp_path)
    whole = run(loaded, some, tmp_path / "whole")
    state = whole.train()
    assert state.global_step == 4

    class KilledError(Exception):
        pass

    def kill(words: str, done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    torch.manual_seed(9)
    with pytest.raises(KilledError):
        run(loaded, some, tmp_path / "cut").train(tell=kill)
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / CHECKPOINTS / "checkpoint-2"
    # A checkpoint that was being written when the kill came.
    torn = tmp_path / "cut" / CHECKPOINTS / "checkpoint-3"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    torch.manual_seed(7)
    again = run(loaded, some, tmp_path / "cut")
    found = again.train(resume=True)
    assert found.global_step == 4
    first, second = weights(whole.learner.learned), weights(again.learner.learned)
    assert all(torch.equal(first[name], second[name]) for name in first)
    both = [curve.points(one.log_history) for one in (state, found)]
    assert both[0] == both[1] and len(both[0]) == 4
    control = run(loaded, some, tmp_path / "other", seed=1)
    control.train()
    third = weights(control.learner.learned)
    assert any((first[name] - third[name]).abs().max() > 1e-3 for name in first)


def test_a_curve_is_written_and_drawn(loaded: Loaded, tmp_path: Path) -> None:
    found = run(loaded, entries(tmp_path), tmp_path / "run")
    found.train()
    made = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert [one["step"] for one in made["points"]] == [1, 2, 3, 4]
    assert all(one["loss"] > 0 for one in made["points"])
    assert [one["step"] for one in made["points"] if "held_out_loss" in one] == [2, 4]
    with Image.open(tmp_path / "run" / "curve.png") as picture:
        assert min(picture.size) > 300
    assert curve.smoothed([3.0, 3.0]) == pytest.approx([3.0, 3.0])
    assert curve.smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


def test_a_folder_that_holds_a_run_is_not_overwritten(loaded: Loaded, tmp_path: Path) -> None:
    some = entries(tmp_path)
    run(loaded, some, tmp_path / "run", steps=2).train()
    with pytest.raises(VlmpruneError, match="holds a run already; go on with it by --resume"):
        run(loaded, some, tmp_path / "run", steps=2).train()
    with pytest.raises(VlmpruneError, match=r"another run \(rate 0\.001, not 0\.002\)"):
        run(loaded, some, tmp_path / "run", steps=2, rate=2e-3).train(resume=True)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    # Killed before its first checkpoint: it starts again.
    assert run(loaded, some, tmp_path / "run", steps=2).train(resume=True).global_step == 2


def test_kept_states_stand_for_the_encoder(loaded: Loaded, tmp_path: Path) -> None:
    """The loss over states from the disk is the loss with the encoder, to half precision."""
    pruner = QueCC.fresh(loaded.model, window=2, hidden=16)
    rows = RowMaker(loaded.processor)
    some = entries(tmp_path)
    states = States(tmp_path / "cache", loaded.model, pruner, rows, some)
    assert states.layers == (5, 7, 10)
    states.fill()
    calls: list[int] = []
    hook = loaded.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        kept = Learner(loaded.model, pruner, states=states)
        with kept.attached():
            fast = kept(**batch_of(loaded, tmp_path, states))["loss"]
        assert not calls
        plain = Learner(loaded.model, pruner)
        with plain.attached():
            slow = plain(**batch_of(loaded, tmp_path))["loss"]
            other = plain(
                **(batch_of(loaded, tmp_path) | {"pixel_values": torch.zeros(2, 3, SIDE, SIDE)})
            )
        assert calls
    hook.remove()
    assert float(fast) == pytest.approx(float(slow), rel=2e-3)
    assert abs(float(other["loss"]) - float(slow)) > 0.01
    # What is there is not computed again; another set of pictures is refused.
    again = States(tmp_path / "cache", loaded.model, pruner, rows, some)
    again.fill(lambda done, total: None)
    assert torch.equal(
        torch.from_numpy(again.arrays[5].copy()), torch.from_numpy(states.arrays[5].copy())
    )
    with pytest.raises(VlmpruneError, match="is of other pictures, layers or weights"):
        States(tmp_path / "cache", loaded.model, pruner, rows, some[:2]).fill()
    # A method that reads more of the encoder than states needs it in each step.
    fresh = VisToG.fresh(loaded.model, tokens=4)
    for other in (fresh, ToMe(keep=8), EViT(keep=8), VisionZip(keep=8)):
        with pytest.raises(VlmpruneError, match="needs the vision encoder itself in every step"):
            States(tmp_path / "other", loaded.model, other, rows, some)
    # One whose pictures are several crops, or have sizes of their own.
    crops = ZOO["llava_next"].build()
    said = f"^the encoder of {type(crops).__name__} does not see each picture as one crop of one si"
    with pytest.raises(VlmpruneError, match=said):
        States(tmp_path / "other", crops, QueCC.fresh(crops, window=2), rows, some)
    (index,) = (tmp_path / "cache").glob("*.json")
    index.write_text(index.read_text().rstrip().removesuffix("}"))
    with pytest.raises(VlmpruneError, match="cannot be read as JSON; give another folder, or del"):
        States(tmp_path / "cache", loaded.model, pruner, rows, some).fill()


def test_a_lora_is_trained_saved_and_taken_off(loaded: Loaded, tmp_path: Path) -> None:
    wanted = Wanted("quecc", {"window": 2, "hidden": 16}, lora=2, side=SIDE, held_out=0)
    settings = TrainingSettings(steps=3, batch=2, turns=2, warm_up=0, every=3, save_every=3)
    before = weights(loaded.model)
    made = build(
        loaded, check(wanted), wanted, entries(tmp_path), None, None, settings, tmp_path / "run", {}
    )
    made.train()
    assert all(bool(one.detach().any()) for one in made.learner.lora().values())
    batch = batch_of(loaded, tmp_path)
    with torch.no_grad(), made.learner.attached():
        trained = made.learner(**batch)["loss"]
    finish(made, torch.float32, {"steps": 3})
    assert not hasattr(loaded.model, "peft_config")
    after = weights(loaded.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    pruner = QueCC.from_pretrained(tmp_path / "run")
    assert pruner.trained.notes["training"] == {"steps": 3}
    with torch.no_grad():
        whole = Learner(loaded.model, pruner)
        with whole.attached():
            loss = whole(**batch)["loss"]
        pruner.trained.lora = None
        with whole.attached():
            without = whole(**batch)["loss"]
    assert float(loss) == pytest.approx(float(trained), abs=1e-5)
    assert abs(float(without) - float(loss)) > 1e-5


def test_another_rank_than_the_weights_bring_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    first = Wanted("quecc", {"window": 2, "hidden": 16}, lora=2, side=SIDE, held_out=0)
    settings = TrainingSettings(steps=1, batch=1, turns=1, warm_up=0, every=1, save_every=1)
    some = entries(tmp_path)

    def made(wanted: Wanted, name: str) -> Any:
        kind = check(wanted)
        return build(loaded, kind, wanted, some, None, None, settings, tmp_path / name, {})

    finish(made(first, "run"), torch.float32, {})
    on = {"hyper": {}, "base": str(tmp_path / "run")}
    said = "^--lora 3 is not the rank of the LoRA that the weights bring, 2; leave it out"
    with pytest.raises(VlmpruneError, match=said):
        made(replace(first, lora=3, **on), "next")
    for rank in (0, 2):
        finish(made(replace(first, lora=rank, **on), f"next-{rank}"), torch.float32, {})


@pytest.mark.parametrize("size", [1_000_000, 5_000_000])
def test_a_disk_without_room_for_a_checkpoint_is_told(
    size: int, loaded: Loaded, tmp_path: Path
) -> None:
    """The writers of weights (3 MB) and of the optimizer (7 MB) say so each in a way of its own."""
    out = tmp_path / "run"
    made = run(loaded, entries(tmp_path), out)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(VlmpruneError) as told:
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(told.value)
    assert "\n" not in said and str(out) in said
    assert "a checkpoint cannot be written into" in said and "make room there and go on by" in said


@pytest.mark.parametrize("moves", ["module", "lora"])
def test_module_and_lora_have_rates_of_their_own(
    moves: str, loaded: Loaded, tmp_path: Path
) -> None:
    """What has rate 0 stays as it began, and the other does not."""
    wanted = Wanted("quecc", {"window": 2, "hidden": 16}, lora=2, side=SIDE, held_out=0)
    rates = {"rate": 1e-2 * (moves == "module"), "lora_rate": 1e-2 * (moves == "lora")}
    settings = TrainingSettings(
        steps=2, batch=1, turns=1, warm_up=0, every=2, save_every=2, **rates
    )
    made = build(
        loaded, check(wanted), wanted, entries(tmp_path), None, None, settings, tmp_path / "run", {}
    )
    parts = {"module": made.learner.trained(), "lora": made.learner.lora()}
    before = {
        part: {n: one.detach().clone() for n, one in of.items()} for part, of in parts.items()
    }
    made.train()
    finish(made, torch.float32, {})
    for part, of in parts.items():
        assert before[part]
        moved = any(not torch.equal(one, before[part][name]) for name, one in of.items())
        assert moved == (part == moves)


def test_the_page_on_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "train.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "train.md", "exec", dont_inherit=True), space)
    found = QueCC.from_pretrained("quecc-run")
    own = space["pruner"].module.state_dict()
    assert all(torch.equal(own[name], value) for name, value in found.module.state_dict().items())
