"""`attach(model, logits="full")`: logits at the user's own columns, and what is said without it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from answers import DIFFERENT, TOLERANCE, same
from packing import alone, packed, samples
from stock import CACHE
from vlmprune import PLPHP, EViT, FastV, RandomTokens, ToMe, VisPruner, VlmpruneError
from vlmprune.hosts import outputs
from zoo import ZOO, Request
from zoo_oracle import dropped_columns, overlooking

pytestmark = pytest.mark.oracle

# What forwards return beside logits, and a trainer gathers unless told otherwise.
BESIDE = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]
ROWS: list[list[str]] = [["image"], ["image", "image"]]


def made(family: str, side: str = "left", rows: Any = ROWS) -> tuple[Any, Request]:
    built = ZOO[family].build()
    return built, ZOO[family].request(built, rows, text=[5, 8][: len(rows)], side=side)


def scores(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L - 1] log-probability of each column's token, read where harnesses read it."""
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def expected(masked: Tensor, req: Request, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the masked model, from the last column that is left before; and where it is."""
    ids, left = req.inputs["input_ids"], (req.inputs["attention_mask"] != 0) & ~dropped
    found = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    there = torch.zeros_like(found, dtype=torch.bool)
    for row, stays in enumerate(left):
        places = stays.nonzero()[:, 0].tolist()
        for before, after in pairwise(places):
            found[row, after - 1] = masked[row, before].log_softmax(-1)[ids[row, after]]
            there[row, after - 1] = True
    return found, there


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_masked_model(family: str, side: str) -> None:
    built, req = made(family, side)
    ids = req.inputs["input_ids"]
    with VisPruner(keep=3)(built, logits="full") as handle:
        out = built(**req.inputs)
        report, policy = handle.report, handle.positions
    assert report is not None and handle.logits == "full"
    dropped = dropped_columns(req, report)
    masked = built(**overlooking(built, req, dropped, policy)).logits
    assert out.logits.shape == masked.shape == (*ids.shape, out.logits.shape[-1])
    assert out.logits.dtype == masked.dtype
    due, there = expected(masked, req, dropped)
    found = scores(out.logits, ids)
    assert float((found - due)[there].abs().max()) < TOLERANCE
    # Words right behind an image, whose dropped last token stands where they are read, are there.
    assert bool((there & dropped[:, :-1]).any())
    left = (req.inputs["attention_mask"] != 0) & ~dropped
    assert float((out.logits - masked)[left].abs().max()) < TOLERANCE
    silent = dropped & torch.nn.functional.pad(dropped[:, 1:], (0, 1))
    assert bool(out.logits[silent].isneginf().all()) and int(silent.sum()) > 5
    assert bool(out.logits[~silent].isfinite().all())
    # Control: the unpruned model's are others.
    assert float((scores(built(**req.inputs).logits, ids) - due)[there].abs().max()) > DIFFERENT


@torch.no_grad()
def test_a_harness_slice_is_right_and_without_it_is_told() -> None:
    """lmms-eval's own models look up the answer's columns, whose slice may come out empty."""
    built, req = made("llava", rows=[["image"]])
    ids = req.inputs["input_ids"]
    answer = slice(ids.shape[1] - 3, ids.shape[1])
    wrong = ids.clone()
    wrong[:, answer] = 60
    inputs = req.inputs | {"input_ids": wrong}
    with VisPruner(keep=3)(built):
        with pytest.warns(UserWarning, match="logits='full'") as told:
            short = built(**inputs).logits
        assert len(told) == 1 and f"of {ids.shape[1]}, so" in str(told[0].message)
        # What is wrong: nothing is compared, and so all is the answer.
        assert bool((short.argmax(-1)[:, answer] == wrong[:, answer][:, :0]).all())
        with warnings.catch_warnings():
            # Once an attachment.
            warnings.simplefilter("error")
            built(**inputs)
    with VisPruner(keep=3)(built, logits="full") as handle:
        full = built(**inputs).logits
        greedy = full.argmax(-1)[:, answer.start - 1 : -1]
        assert greedy.shape == (1, 3)
        assert handle.report is not None
    dropped = dropped_columns(req, handle.report)
    masked = built(**overlooking(built, replace(req, inputs=inputs), dropped, "compact")).logits
    assert torch.equal(greedy, masked.argmax(-1)[:, answer.start - 1 : -1])
    assert not bool((greedy == wrong[:, answer]).all())


@torch.no_grad()
def test_who_says_short_is_not_told_nor_is_what_is_right_anyhow() -> None:
    built, req = made("llava")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with VisPruner(keep=3)(built, logits="short") as handle:
            short = built(**req.inputs).logits
            assert handle.logits == "short"
        assert short.shape[1] < req.inputs["input_ids"].shape[1]
        with VisPruner(keep=3)(built) as handle:
            # The last two columns are the user's, too.
            last = built(**req.inputs, logits_to_keep=2).logits
            assert torch.equal(last, short[:, -2:])
            built.generate(**req.inputs, max_new_tokens=2)
            built.model(**req.inputs)
            with torch.enable_grad():
                built(**req.inputs, labels=req.inputs["input_ids"])
        for inside in (FastV(keep=2, layer=1), PLPHP(r=0.3)):
            with inside(built):
                logits = built(**req.inputs, use_cache=True).logits
            assert logits.shape[:2] == req.inputs["input_ids"].shape
            with inside(built, logits="full"):
                assert torch.equal(built(**req.inputs, use_cache=True).logits, logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_chosen_columns_are_the_users(side: str) -> None:
    built, req = made("llava", side)
    length = req.inputs["input_ids"].shape[1]
    with VisPruner(keep=3)(built, logits="full"):
        full = built(**req.inputs).logits
        for n in (1, 4, length - 3, length, length + 5):
            found = built(**req.inputs, logits_to_keep=n).logits
            assert same(found.nan_to_num(), full[:, -n:].nan_to_num())
        for picks in (torch.tensor([length - 1, 2, 3]), torch.tensor([-1]), torch.arange(length)):
            found = built(**req.inputs, logits_to_keep=picks).logits
            assert same(found.nan_to_num(), full[:, picks].nan_to_num())
    with VisPruner(keep=3)(built), pytest.raises(VlmpruneError, match="attach with logits='full'"):
        built(**req.inputs, logits_to_keep=torch.tensor([1]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_models_own_loss_and_gradients_are_unchanged(family: str) -> None:
    built, req = made(family)
    labels = req.inputs["input_ids"].masked_fill(req.inputs["attention_mask"] == 0, -100)
    loss, grads = dict[str, Tensor](), dict[str, Tensor]()
    for way in ("short", "full"):
        built.zero_grad()
        with VisPruner(keep=3)(built, logits=way):
            out = built(**req.inputs, labels=labels)
        out.loss.backward()
        loss[way], grads[way] = out.loss.detach(), built.lm_head.weight.grad.clone()
        with torch.no_grad(), VisPruner(keep=3)(built, logits=way):
            plain = built(**req.inputs, labels=labels, return_dict=False)
        assert torch.equal(plain[0], out.loss) and torch.equal(plain[1], out.logits)
    assert torch.equal(loss["short"], loss["full"]) and torch.equal(grads["short"], grads["full"])


def answered(req: Request, words: int = 5) -> Tensor:
    """Labels of the last words alone, as of an answer."""
    real, ids = req.inputs["attention_mask"], req.inputs["input_ids"]
    behind = real.flip(1).cumsum(1).flip(1)
    return ids.masked_fill((real == 0) | (behind > words), -100)


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_smoothing_is_finite_and_right(side: str) -> None:
    built, req = made("llava", side)
    labels = answered(req)
    assert bool((labels[req.inputs["input_ids"] == built.config.image_token_id] == -100).all())
    with VisPruner(keep=3)(built, logits="full") as handle:
        out = built(**req.inputs)
        loss = LabelSmoother(epsilon=0.1)(out, labels, shift_labels=True)
        # As DPO does: the answers' tokens summed, the others masked.
        own = scores(out.logits, labels.clamp(min=0))
        summed = own.masked_fill(labels[:, 1:] == -100, 0).sum(dim=1)
        (loss - summed.mean()).backward()
    found = [one.grad for one in built.parameters() if one.grad is not None]
    assert len(found) > 20 and all(bool(one.isfinite().all()) for one in found)
    grad = built.lm_head.weight.grad.clone()
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report)
    built.zero_grad()
    masked = built(**overlooking(built, req, dropped, handle.positions)).logits
    wanted = LabelSmoother(epsilon=0.1)({"logits": masked}, labels, shift_labels=True)
    theirs = scores(masked, labels.clamp(min=0))
    both = theirs.masked_fill(labels[:, 1:] == -100, 0).sum(dim=1)
    (wanted - both.mean()).backward()
    assert abs(float((loss - wanted).detach())) < TOLERANCE
    assert same(summed.detach(), both.detach())
    assert float((grad - built.lm_head.weight.grad).abs().max()) < 1e-4
    # Control: without the option the smoother meets logits that are no longer the labels'.
    with torch.no_grad(), VisPruner(keep=3)(built), pytest.raises(RuntimeError), pytest.warns():
        LabelSmoother()(built(**req.inputs), labels, shift_labels=True)


@torch.no_grad()
def test_packed_samples_have_theirs_in_their_rows() -> None:
    entry = ZOO["llava"]
    built = entry.build()
    requests = samples(entry, built, [1, 2, 1], (3, 4, 5))
    inputs = packed(built, requests, [3])
    with VisPruner(keep=3)(built, logits="full"):
        found = built(**inputs).logits
        wanted = torch.cat([built(**alone(built, one)).logits for one in requests], dim=1)
    assert found.shape[:2] == inputs["input_ids"].shape
    assert torch.equal(found.isneginf(), wanted.isneginf()) and bool(found.isneginf().any())
    assert same(found.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0))
    # Control: of the whole row as one sample they are others.
    mask = torch.ones_like(inputs["input_ids"])
    with VisPruner(keep=3, positions="original")(built, logits="full"):
        mixed = built(**inputs, attention_mask=mask).logits
    assert not same(mixed.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0))


@torch.no_grad()
def test_generation_pays_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, req = made("llava")
    settings: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with VisPruner(keep=3)(built):
        plain = built.generate(**req.inputs, **settings)
    monkeypatch.setattr(outputs, "logits_at", None)
    with VisPruner(keep=3)(built, logits="full"):
        assert torch.equal(built.generate(**req.inputs, **settings), plain)
        with pytest.raises(TypeError):
            built(**req.inputs)


@torch.no_grad()
def test_later_turns_half_precision_and_merged_tokens() -> None:
    built, req = made("llava")
    more = torch.full((2, 2), 61)
    mask = torch.nn.functional.pad(req.inputs["attention_mask"], (0, 2), value=1)
    for pruner in (VisPruner(keep=3), ToMe(keep=6), EViT(keep=6), RandomTokens(keep=1.0)):
        found = {}
        for way in ("short", "full"):
            with pruner(built, logits=way):
                first = built(**req.inputs, use_cache=True)
                again = {"attention_mask": mask, CACHE: first[CACHE]}
                found[way] = built(input_ids=more, **again).logits
        assert torch.equal(found["short"], found["full"])
        assert first.logits.shape[:2] == req.inputs["input_ids"].shape
    # The last one dropped nothing.
    assert torch.equal(first.logits, built(**req.inputs).logits)
    half = ZOO["llava"].build().to(torch.bfloat16)
    pixels = req.inputs["pixel_values"].to(torch.bfloat16)
    with VisPruner(keep=3)(half, logits="full"):
        assert half(**req.inputs | {"pixel_values": pixels}).logits.dtype == torch.bfloat16


def test_a_value_that_is_not_known_is_refused_and_leaves_the_model_alone() -> None:
    built = ZOO["llava"].build()
    with pytest.raises(VlmpruneError, match="logits='all' is not known; use 'short' or 'full'"):
        VisPruner(keep=3).attach(built, logits="all")  # type: ignore[arg-type]
    assert "forward" not in vars(built)


def test_an_output_without_logits_is_refused() -> None:
    """As of a trainer's own forward, which computes its loss inside."""
    built, req = made("llava")
    own = built.forward

    def forward(**inputs: Any) -> Any:
        own(**inputs)
        return outputs.ENCODED()

    built.forward = forward
    with VisPruner(keep=3)(built, logits="full"), pytest.raises(VlmpruneError, match="holds none"):
        built(**req.inputs, use_cache=False)


class Answers(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a request with their labels."""

    def __init__(self, req: Request) -> None:
        names = ("input_ids", "attention_mask", "pixel_values")
        self.rows = [
            {name: req.inputs[name][i] for name in names} | {"labels": answered(req)[i]}
            for i in range(len(req.inputs["input_ids"]))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainers_metrics_are_right(tmp_path: Path, smoothing: float) -> None:
    """Its labels are the user's, and its logits whatever the model returned."""
    built, req = made("llava", rows=[["image"], ["image"]])

    def metrics(found: Any) -> dict[str, float]:
        predicted, labels = found.predictions[:, :-1].argmax(-1), found.label_ids[:, 1:]
        own = predicted[labels != -100]
        return {"right": float((own == labels[labels != -100]).mean()), "sum": float(own.sum())}

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=2,
        label_smoothing_factor=smoothing,
        report_to=[],
        use_cpu=True,
    )
    with VisPruner(keep=3)(built, logits="full") as handle:
        trainer = Trainer(
            model=built, args=settings, eval_dataset=Answers(req), compute_metrics=metrics
        )
        found = trainer.evaluate(ignore_keys=BESIDE)
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report)
    with torch.no_grad():
        masked = built(**overlooking(built, req, dropped, "compact")).logits
    labels = answered(req)[:, 1:]
    own = masked[:, :-1].argmax(-1)[labels != -100]
    assert found["eval_sum"] == float(own.sum())
    assert found["eval_right"] == float((own == labels[labels != -100]).float().mean())
    assert torch.tensor(found["eval_loss"]).isfinite()
