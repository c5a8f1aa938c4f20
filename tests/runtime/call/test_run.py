"""Every way of calling a model works while a pruner is attached, and means what it meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from answers import DIFFERENT, TOLERANCE
from stock import CACHE, cache_of
from tiny import IMAGE, VOCABULARY, Request, dropped_columns, model, request
from tiny_oracle import oracle
from vlmprune import VisPruner, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images

pytestmark = pytest.mark.oracle

POLICIES = pytest.mark.parametrize("policy", ["compact", "original"])
FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next"])


def row_repeated(req: Request, times: int) -> Request:
    """The same request with each row repeated, for oracles that must not expand images."""
    assert req.inputs["pixel_values"].shape[0] == req.inputs["input_ids"].shape[0]
    inputs = {k: v.repeat_interleave(times, 0) for k, v in req.inputs.items()}
    return Request(inputs, [n for n in req.lengths for _ in range(times)])


@FAMILIES
@POLICIES
def test_sampling(family: str, policy: Any) -> None:
    built = model(family)
    req = request(built, [1, 1, 1])
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8}
    with VisPruner(keep=4, positions=policy)(built) as handle:
        torch.manual_seed(3)
        pruned = built.generate(**req.inputs, **options)
        again = built.generate(**req.inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(pruned, oracle(built, req, handle.report.kept, policy, **options))
    assert not torch.equal(pruned, again)


@POLICIES
def test_beams(policy: Any) -> None:
    """Under either policy; other families and methods are in `runtime/test_matrix.py`."""
    built = model()
    req = request(built, [1, 1])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    with VisPruner(keep=4, positions=policy)(built) as handle:
        pruned = built.generate(**req.inputs, **options)
    assert torch.equal(pruned, oracle(built, req, handle.report.kept, policy, **options))
    others = [(n - 1 - k).flip(0) for k, n in zip(handle.report.kept, req.lengths, strict=True)]
    assert not torch.equal(pruned, oracle(built, req, others, policy, **options))


@FAMILIES
def test_beams_with_unequal_numbers_of_images(family: str) -> None:
    built = model(family)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5}
    batch = request(built, [1, 2])
    with VisPruner(keep=4)(built) as handle:
        together = built.generate(**batch.inputs, **options)
        kept = handle.report.kept
        assert len(kept) == 3
        # Each row alone must give what it gave in the batch.
        start = 0
        for row, count in enumerate([1, 2]):
            real = batch.inputs["attention_mask"][row].bool()
            alone = {
                k: v[start : start + count]
                for k, v in batch.inputs.items()
                if k in ("pixel_values", "image_sizes")
            }
            alone["input_ids"] = batch.inputs["input_ids"][row][real][None]
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            single = built.generate(**alone, **options)
            assert torch.equal(single[0, -5:], together[row, -5:])
            start += count


def test_several_samples_a_prompt() -> None:
    built = model()
    req = request(built, [1, 1])
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    with VisPruner(keep=4)(built) as handle:
        torch.manual_seed(5)
        pruned = built.generate(**req.inputs, **options)
    twice = row_repeated(req, 3)
    torch.manual_seed(5)
    kept = [k for k in handle.report.kept for _ in range(3)]
    expected = oracle(built, twice, kept, "compact", **(options | {"num_return_sequences": 1}))
    assert pruned.shape[0] == 6
    assert torch.equal(pruned, expected)


@FAMILIES
def test_repeated_rows_keep_their_images_in_order(family: str) -> None:
    """Samples that leave nothing to chance are all the greedy answer."""
    built = model(family)
    req = request(built, [2, 1])
    with VisPruner(keep=4)(built):
        greedy = built.generate(**req.inputs, do_sample=False, max_new_tokens=6)
        options = {"do_sample": True, "top_k": 1, "max_new_tokens": 6}
        samples = built.generate(**req.inputs, **options, num_return_sequences=2)
    assert torch.equal(samples, greedy.repeat_interleave(2, 0))
    assert not torch.equal(greedy[0, -6:], greedy[1, -6:])


@FAMILIES
def test_text_only(family: str) -> None:
    built = model(family)
    req = request(built, [0, 0])
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = built.generate(**req.inputs, **options)
    with VisPruner(keep=4)(built) as handle:
        assert torch.equal(built.generate(**req.inputs, **options), expected)
        with torch.no_grad():
            logits = built(**req.inputs).logits
    assert handle.report.kept == []
    assert "no image" in str(handle.report)
    with torch.no_grad():
        assert torch.equal(logits, built(**req.inputs).logits)


@FAMILIES
@POLICIES
def test_manual_decoding(family: str, policy: Any) -> None:
    """A loop over plain forwards gives what `generate` gives."""
    built = model(family)
    req = request(built, [1, 2])
    with VisPruner(keep=4, positions=policy)(built), torch.no_grad():
        expected = built.generate(
            **req.inputs,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        out = built(**req.inputs, use_cache=True)
        mask = req.inputs["attention_mask"]
        for step, wanted in enumerate(expected.logits):
            assert float((out.logits[:, -1] - wanted).abs().max()) < TOLERANCE
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat((mask, torch.ones_like(token)), 1)
            given = {"attention_mask": mask} if step % 2 else {}
            out = built(input_ids=token, **{CACHE: cache_of(out)}, **given)


def test_streaming_shows_the_whole_prompt() -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            ids = ids if isinstance(ids, list) else torch.as_tensor(ids).flatten().tolist()
            return "".join(f"{i} " for i in ids)

    built = model()
    req = request(built, [1])

    def stream(skip: bool) -> list[str]:
        texts: list[str] = []
        streamer = TextStreamer(Words(), skip_prompt=skip)
        streamer.on_finalized_text = lambda text, stream_end=False: texts.append(text)
        built.generate(**req.inputs, streamer=streamer, max_new_tokens=4, do_sample=False)
        return "".join(texts).split()

    with VisPruner(keep=4)(built):
        out = built.generate(**req.inputs, max_new_tokens=4, do_sample=False)
        assert stream(skip=False) == [str(i) for i in out[0].tolist()]
        assert stream(skip=True) == [str(i) for i in out[0, -4:].tolist()]


def test_length_limits_mean_what_they_meant() -> None:
    built = model()
    req = request(built, [1])
    length = req.inputs["input_ids"].shape[1]
    config = copy.deepcopy(built.generation_config)
    config.max_length, config.do_sample = length + 3, False
    with VisPruner(keep=4)(built):
        by_argument = built.generate(**req.inputs, max_length=length + 3, do_sample=False)
        by_config = built.generate(**req.inputs, generation_config=config)
        kept = built.generate(**req.inputs, max_new_tokens=3, do_sample=False)
    assert by_argument.shape[1] == by_config.shape[1] == length + 3
    assert torch.equal(by_argument, kept)
    assert config.max_length == length + 3


@POLICIES
@pytest.mark.parametrize("how", ["use_cache=False", "prefill_chunk_size", "static"])
def test_other_ways_of_caching(policy: Any, how: str) -> None:
    built = model()
    req = request(built, [1])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    changes: dict[str, Any] = {
        "use_cache=False": {"use_cache": False},
        "prefill_chunk_size": {"prefill_chunk_size": 6},
        "static": {"cache_implementation": "static"},
    }[how]
    if how == "prefill_chunk_size" and not chunks_hold_images():
        with VisPruner(keep=4)(built), pytest.raises(VlmpruneError, match="upgrade transformers"):
            built.generate(**req.inputs, **options, **changes)
        return
    with VisPruner(keep=4, positions=policy)(built):
        expected = built.generate(**req.inputs, **options)
        got = built.generate(**req.inputs, **options, **changes)
    assert torch.equal(got, expected)
    with VisPruner(keep=4, positions="original" if policy == "compact" else "compact")(built):
        control = built.generate(
            **req.inputs, **options, return_dict_in_generate=True, output_logits=True
        ).logits
    with VisPruner(keep=4, positions=policy)(built):
        logits = built.generate(
            **req.inputs, **options, **changes, return_dict_in_generate=True, output_logits=True
        ).logits
        wanted = built.generate(
            **req.inputs, **options, return_dict_in_generate=True, output_logits=True
        ).logits
    for got_logits, expected_logits in zip(logits, wanted, strict=True):
        assert float((got_logits - expected_logits).abs().max()) < TOLERANCE
    assert max(float((a - b).abs().max()) for a, b in zip(logits, control, strict=True)) > DIFFERENT


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_ignores_what_was_dropped(family: str, side: str) -> None:
    built = model(family)
    # The second row is the longer one before pruning and the shorter one after it.
    req = request(built, [1, 2], text=[20, 2], side=side)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    # Stock models predict a padded row's first token from padding; leave that out here.
    padded = mask[:, 0] == 0
    labels[padded, (mask[padded] == 0).sum(1)] = -100
    assert labels[1, 0] != -100
    with VisPruner(keep=4)(built) as handle:
        pruned = built(**req.inputs, labels=labels)
        pruned.loss.backward()
    grads = [p.grad for p in built.model.multi_modal_projector.parameters()]
    assert all(g is not None and float(g.abs().max()) > 0 for g in grads)

    dropped = dropped_columns(req, handle.report.kept)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    positions = columns - dropped.long().cumsum(1)
    with torch.no_grad():
        full = built(
            **(req.inputs | {"attention_mask": mask * ~dropped, "position_ids": positions})
        ).logits
    total, count = 0.0, 0
    for row in range(2):
        here = mask[row].bool() & ~dropped[row]
        logits, wanted = full[row][here][:-1], labels[row][here][1:]
        total += float(
            torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        )
        count += int((wanted != -100).sum())
    assert abs(float(pruned.loss.detach()) - total / count) < TOLERANCE
    with torch.no_grad():
        assert (
            abs(float(pruned.loss.detach()) - float(built(**req.inputs, labels=labels).loss))
            > DIFFERENT
        )


def test_gradients_reach_only_kept_features() -> None:
    built = model()
    req = request(built, [1])
    pixels = req.inputs["pixel_values"].requires_grad_()
    with VisPruner(keep=4)(built):
        built(**(req.inputs | {"pixel_values": pixels})).logits.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) > 0


def test_positional_and_named_inputs() -> None:
    built = model()
    req = request(built, [1])
    options = {"max_new_tokens": 3, "do_sample": False}
    rest = {k: v for k, v in req.inputs.items() if k != "input_ids"}
    no_mask = {k: v for k, v in req.inputs.items() if k != "attention_mask"}
    with VisPruner(keep=4)(built), torch.no_grad():
        named = built.generate(**req.inputs, **options)
        assert torch.equal(named, built.generate(req.inputs["input_ids"], **rest, **options))
        assert torch.equal(named, built.generate(**no_mask, **options))
        short = built(**req.inputs).logits
        assert torch.equal(short, built(req.inputs["input_ids"], **rest).logits)
        assert torch.equal(short, built(**req.inputs, return_dict=False)[0])


def test_the_given_inputs_are_not_changed() -> None:
    built = model()
    req = request(built, [1, 1])
    before = {k: v.clone() for k, v in req.inputs.items()}
    with VisPruner(keep=4)(built), torch.no_grad():
        built.generate(**req.inputs, max_new_tokens=2)
        built(**req.inputs)
    assert all(torch.equal(before[k], v) for k, v in req.inputs.items())


def test_stopping_criteria_end_a_run() -> None:
    class After(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return torch.full((ids.shape[0],), self.calls >= 2)

    built = model()
    req = request(built, [1])
    with VisPruner(keep=4)(built):
        out = built.generate(**req.inputs, max_new_tokens=9, stopping_criteria=[After()])
    assert out.shape[1] == req.inputs["input_ids"].shape[1] + 2
    assert int(out.max()) < VOCABULARY
