"""The page on training with pruned tokens, in Transformers' Trainer, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

import training_page
from answers import DIFFERENT, TOLERANCE
from training_page import masked, per_token, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def test_trainer(tmp_path: Path) -> None:
    """The loss of a step is the masked model's, and the model learns."""
    page = training_page.page()
    model, handle, data = page["model"], page["handle"], rows(4)
    inputs = page["collate"](data)
    labels = inputs["labels"]
    # Answers alone carry loss.
    assert int((labels != -100).sum()) < labels.shape[1]
    assert not bool((labels == model.config.image_token_id).any())
    answers = labels != -100
    assert torch.equal(page["words"](inputs)[answers], labels[answers])
    assert not bool((page["words"](inputs) == model.config.image_token_id).any())
    with torch.no_grad():
        loss = model(**inputs, use_cache=False).loss
        kept = handle.report.kept
        handle.detach()
        whole = model(**inputs, use_cache=False).loss
        due = per_token(masked(model, inputs, kept, handle.positions), labels)
    expected = -due.sum() / (labels[:, 1:] != -100).sum()
    assert abs(float(loss - expected)) < TOLERANCE
    assert abs(float(whole - expected)) > DIFFERENT
    again = page["VisPruner"](keep=64).attach(model, logits="full")
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-4}
    trainer = Trainer(
        model=model,
        args=page["settings"](str(tmp_path), save_strategy="no", logging_steps=1, **options),
        train_dataset=data,
        data_collator=page["collate"],
    )
    trainer.train()
    assert again.report is not None and again.report.visual_tokens_after == 2 * 64
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert len(losses) == 3 and all(0 < one < 20 for one in losses)
    model.eval()
    with torch.no_grad():
        assert float(model(**inputs, use_cache=False).loss) < float(loss)


def test_the_rows_of_the_page_have_answers_and_pictures_of_their_own() -> None:
    page = training_page.page()
    assert len(page["rows"]) == 46
    inputs = page["collate"](page["rows"])
    assert bool((inputs["labels"] != -100).any(dim=1).all())
    # All questions about one picture stand together.
    pictures = inputs["pixel_values"].flatten(1).unique_consecutive(dim=0)
    assert len(pictures) == len(pictures.unique(dim=0)) == 4


def test_packed_samples_give_the_loss_of_single_ones() -> None:
    page = training_page.page()
    model, data = page["model"], rows(3)
    together, alone = page["packed"](data), [page["collate"]([row]) for row in data]
    tokens = [int((one["labels"][:, 1:] != -100).sum()) for one in alone]
    with torch.no_grad():
        found = model(**together).loss
        due = [float(model(**one, use_cache=False).loss) for one in alone]
        # Control: as one sample the later ones see the earlier.
        mask = torch.ones_like(together["input_ids"])
        del together["position_ids"]
        mixed = model(**together, attention_mask=mask).loss
    wanted = sum(a * n for a, n in zip(due, tokens, strict=True)) / sum(tokens)
    assert abs(float(found) - wanted) < TOLERANCE
    assert abs(float(mixed) - wanted) > DIFFERENT
