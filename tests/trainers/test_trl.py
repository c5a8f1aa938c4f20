"""The page on training with pruned tokens, in TRL: `make test-train` has it installed."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

import training_page
from answers import TOLERANCE
from training_page import finite, masked, per_token, rows
from vlmprune import VlmpruneError

pytest.importorskip("trl")
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SETTINGS: dict[str, Any] = {
    "max_length": None,
    "per_device_train_batch_size": 3,
    "max_steps": 2,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def page() -> dict[str, Any]:
    made = training_page.page()
    made["model"].train()
    return made


def sft(page: dict[str, Any], folder: Path, collator: Any = None, **more: Any) -> Any:
    data = rows(3)
    if collator is None:
        data = page["for_sft"](data)
    return SFTTrainer(
        model=page["model"],
        args=SFTConfig(output_dir=str(folder), **SETTINGS, **more),
        processing_class=page["processor"],
        train_dataset=Dataset.from_list(data),
        data_collator=collator,
    )


def batch(trainer: Any) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


def logged(trainer: Any, name: str) -> list[float]:
    return [one[name] for one in trainer.state.log_history if name in one]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft(page: dict[str, Any], tmp_path: Path, smoothing: float, checkpointing: bool) -> None:
    """Its loss, smoothed or not, is that of the masked model, and so are its metrics."""
    trainer = sft(
        page, tmp_path, label_smoothing_factor=smoothing, gradient_checkpointing=checkpointing
    )
    model, handle, inputs = page["model"], page["handle"], batch(trainer)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    assert finite(model)
    kept, labels = handle.report.kept, inputs["labels"]
    found = {
        name: trainer._metrics["train"][name][-1] for name in ("entropy", "mean_token_accuracy")
    }
    handle.detach()
    with torch.no_grad():
        logits = masked(model, inputs, kept, handle.positions)
        bare = model(**{n: v for n, v in inputs.items() if n != "labels"}).logits
    for one, same in ((logits, True), (bare, False)):
        if smoothing:
            due = LabelSmoother(smoothing)({"logits": one}, labels, shift_labels=True)
        else:
            due = -per_token(one, labels).sum() / (labels[:, 1:] != -100).sum()
        assert (abs(float(loss.detach() - due)) < TOLERANCE) is same
    there = labels[:, 1:] != -100
    spread = torch.distributions.Categorical(logits=logits[:, :-1][there]).entropy().mean()
    assert abs(found["entropy"] - float(spread)) < 1e-4
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[there].float().mean()
    assert abs(found["mean_token_accuracy"] - float(right)) < 1e-6


def test_sft_trains(page: dict[str, Any], tmp_path: Path) -> None:
    trainer = sft(page, tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(math.isfinite(one) for one in losses)
    assert losses[1] < losses[0]
    assert page["handle"].report.visual_tokens_after == 3 * 64


def test_smoothing_needs_logits_at_the_users_columns(page: dict[str, Any], tmp_path: Path) -> None:
    """The control: without them today's loss fails."""
    page["handle"].detach()
    page["VisPruner"](keep=64).attach(page["model"], logits="short")
    trainer = sft(page, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.compute_loss(page["model"], batch(trainer))


def test_sft_packed(page: dict[str, Any], tmp_path: Path) -> None:
    trainer = sft(page, tmp_path, page["packed"], remove_unused_columns=False)
    model, inputs = page["model"], batch(trainer)
    assert "attention_mask" not in inputs and inputs["input_ids"].shape[0] == 1
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(inputs))
        begins = [*(inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist(), None]
        total, tokens = 0.0, 0
        for number, (start, end) in enumerate(pairwise(begins)):
            one = {n: inputs[n][:, start:end] for n in ("input_ids", "labels")}
            own = int((one["labels"][:, 1:] != -100).sum())
            one["pixel_values"] = inputs["pixel_values"][number : number + 1]
            alone = model(**one, attention_mask=torch.ones_like(one["input_ids"]), use_cache=False)
            total, tokens = total + own * float(alone.loss), tokens + own
    assert abs(float(loss) - total / tokens) < TOLERANCE
    trainer.train()
    assert all(math.isfinite(one) for one in logged(trainer, "loss"))


def test_trl_itself_packs_no_pictures(page: dict[str, Any], tmp_path: Path) -> None:
    """As the page says; where this fails, the page has news to tell."""
    for option in ("packing", "padding_free"):
        with pytest.raises(ValueError, match="not supported for vision datasets"):
            sft(page, tmp_path, **{option: True})


def dpo(page: dict[str, Any], folder: Path, reference: Any) -> Any:
    return DPOTrainer(
        model=page["model"],
        ref_model=reference,
        args=DPOConfig(output_dir=str(folder), **SETTINGS),
        processing_class=page["processor"],
        train_dataset=Dataset.from_list(page["for_dpo"](rows(3))),
    )


@pytest.mark.parametrize("pruned", [True, False])
def test_dpo(page: dict[str, Any], tmp_path: Path, pruned: bool) -> None:
    """Log-probabilities are the masked model's; a reference that is pruned alike begins equal."""
    model, handle = page["model"], page["handle"]
    reference = copy.deepcopy(model)
    if pruned:
        page["VisPruner"](keep=64).attach(reference, logits="full")
    trainer = dpo(page, tmp_path, reference)
    inputs = batch(trainer)
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    assert finite(model)
    found = {
        name: trainer._metrics["train"][f"logps/{name}"][-1] for name in ("chosen", "rejected")
    }
    kept = handle.report.kept
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    handle.detach()
    with torch.no_grad():
        chosen, rejected = (
            per_token(masked(model, inputs, kept, handle.positions), labels).sum(dim=1).chunk(2)
        )
    assert abs(found["chosen"] - float(chosen.mean())) < 10 * TOLERANCE
    assert abs(found["rejected"] - float(rejected.mean())) < 10 * TOLERANCE
    # With a reference that sees more the ratios are not those of the policy alone.
    equal = abs(float(loss.detach()) - math.log(2)) < TOLERANCE
    assert equal is pruned


def test_dpo_trains(page: dict[str, Any], tmp_path: Path) -> None:
    reference = copy.deepcopy(page["model"])
    page["VisPruner"](keep=64).attach(reference, logits="full")
    trainer = dpo(page, tmp_path, reference)
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 2 and all(math.isfinite(one) for one in losses) and losses[1] < losses[0]


def test_a_pruner_that_comes_after_the_trainer_says_so(
    page: dict[str, Any], tmp_path: Path
) -> None:
    """What the trainer's own forward returns has no logits to put at columns."""
    page["handle"].detach()
    trainer = sft(page, tmp_path)
    page["VisPruner"](keep=64).attach(page["model"], logits="full")
    with pytest.raises(VlmpruneError, match="attach before a trainer"):
        trainer.compute_loss(page["model"], batch(trainer))
