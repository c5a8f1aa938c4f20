"""Every way of calling a model works while a pruner is attached, and means what it meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, TextStreamer

from stock import CACHE, cache_of
from tiny import IMAGE, VOCABULARY, Request, dropped_columns, model, positions_of, request
from vlmprune import VisPruner, VlmpruneError
from vlmprune.hosts.release import chunks_hold_images

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-5
DIFFERENT = 1e-3
POLICIES = pytest.mark.parametrize("policy", ["compact", "original"])
FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next"])


def oracle(built: Any, req: Request, kept: list[Tensor], policy: str, **options: Any) -> Any:
    mask = req.inputs["attention_mask"]
    dropped = dropped_columns(req, kept)
    changes = {
        "attention_mask": mask * ~dropped,
        "position_ids": positions_of(mask, dropped, policy),
    }
    return built.generate(**(req.inputs | changes), **options)


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


@FAMILIES
@POLICIES
def test_beams(family: str, policy: Any) -> None:
    built = model(family)
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
@pytest.mark.parametrize("how", ["whole", "new ids", "copied cache"])
@pytest.mark.parametrize("new_image", [False, True])
@pytest.mark.parametrize("rows", [[1], [1, 2]])
def test_second_turn(family: str, policy: Any, how: str, new_image: bool, rows: list[int]) -> None:
    """Two turns over one cache equal one long prompt that holds both turns."""
    built = model(family)
    req = request(built, rows)
    later = request(built, [int(new_image)] * len(rows), seed=9)
    options = {"do_sample": False, "max_new_tokens": 5}
    pruner = VisPruner(keep=4, positions=policy)
    cache = DynamicCache(config=built.config.get_text_config())
    real = later.inputs["attention_mask"][0].bool()
    more = later.inputs["input_ids"][:1, real].expand(len(rows), -1)
    if new_image:
        pixels = {k: v for k, v in later.inputs.items() if k in ("pixel_values", "image_sizes")}
        # The same picture for each row, so that rows stay comparable.
        pixels = {k: v[:1].expand(len(rows), *v.shape[1:]) for k, v in pixels.items()}
        lengths = [later.lengths[0]] * len(rows)
    else:
        pixels, lengths = {}, []

    with pruner(built) as handle:
        first = built.generate(**req.inputs, **{CACHE: cache}, **options)
        kept = handle.report.kept
        whole = torch.cat((first, more), 1)
        ones = torch.ones(len(rows), whole.shape[1] - req.inputs["input_ids"].shape[1]).long()
        mask = torch.cat((req.inputs["attention_mask"], ones), 1)
        if how == "copied cache":
            cache = copy.deepcopy(cache)
        ids = whole
        if how == "new ids":
            # The last token of the first answer is not in the cache yet.
            ids = whole[:, first.shape[1] - 1 :]
        second = built.generate(
            input_ids=ids,
            attention_mask=mask,
            **{CACHE: cache},
            **pixels,
            **options,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
        later_kept = handle.report.kept if new_image else []

    # The oracle sees one long prompt, the pictures of each row in order.
    everything = {"input_ids": whole, "attention_mask": mask}
    kept_all, lengths_all, start = [], [], 0
    order: dict[str, list[Tensor]] = {
        k: [] for k in req.inputs if k in ("pixel_values", "image_sizes")
    }
    for row, count in enumerate(rows):
        for k, parts in order.items():
            parts.append(req.inputs[k][start : start + count])
            if new_image:
                parts.append(pixels[k][row : row + 1])
        kept_all += kept[start : start + count]
        lengths_all += req.lengths[start : start + count]
        if new_image:
            kept_all.append(later_kept[row])
            lengths_all.append(lengths[row])
        start += count
    for k, parts in order.items():
        if k == "pixel_values" and parts[0].ndim == 5:
            most = max(p.shape[1] for p in parts)
            parts = [
                torch.cat((p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])), 1)
                for p in parts
            ]
        everything[k] = torch.cat(parts)
    long = Request(everything, lengths_all)
    expected = oracle(
        built, long, kept_all, policy, **options, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(second.sequences[:, -5:], expected.sequences[:, -5:])
    for got, wanted in zip(second.logits, expected.logits, strict=True):
        assert float((got - wanted).abs().max()) < TOLERANCE


def test_turns_may_come_in_any_form() -> None:
    """New ids alone, a plain forward and whole ids, one after the other over one cache."""
    built = model()
    req = request(built, [1])
    later = request(built, [0, 1], seed=4).inputs["input_ids"]
    words = later[:1, -4:]
    whole_dropped = 12
    options = {"do_sample": False, "max_new_tokens": 4, "repetition_penalty": 1.3}

    def talk(forms: list[str]) -> Tensor:
        cache = DynamicCache(config=built.config.get_text_config())
        whole = built.generate(**req.inputs, **{CACHE: cache}, **options)
        for form in forms:
            if form == "plain":
                with torch.no_grad():
                    built(input_ids=whole[:, -1:], **{CACHE: cache})
                whole = torch.cat((whole, words), 1)
                continue
            # What the cache lacks is the last token of the answer, if no forward has fed it.
            done = cache.get_seq_length() + whole_dropped
            ids = torch.cat((whole, words), 1)
            whole = ids
            given = ids[:, done:] if form == "new" else ids
            out = built.generate(
                input_ids=given,
                attention_mask=torch.ones_like(ids),
                **{CACHE: cache},
                **(options | {"repetition_penalty": 1.0}),
            )
            whole = torch.cat((ids, out[:, given.shape[1] :]), 1)
        return whole

    with VisPruner(keep=4, positions="original")(built) as handle:
        expected = talk(["whole", "whole", "whole"])
        assert torch.equal(talk(["new", "whole", "new"]), expected)
        assert torch.equal(talk(["new", "new", "whole"]), expected)
        # A plain forward that feeds words equals a turn that brings them twice as many.
        fed = talk(["plain", "whole"])
        words = torch.cat((words, words), 1)
        assert torch.equal(talk(["whole"]), fed)
        assert handle.report.kept == []


def test_a_cache_from_before_the_pruner() -> None:
    """A cache that was filled without a pruner can be continued under one, in any form."""
    built = model()
    text = request(built, [0], text=3).inputs["input_ids"]
    later = request(built, [1], text=30, seed=4).inputs
    options = {"do_sample": False, "max_new_tokens": 4}
    results = []
    for form in ("whole", "new"):
        cache = DynamicCache(config=built.config.get_text_config())
        first = built.generate(input_ids=text, **{CACHE: cache}, **options)
        ids = torch.cat((first, later["input_ids"]), 1)
        done = cache.get_seq_length() * (form == "new")
        with VisPruner(keep=4)(built) as handle:
            out = built.generate(
                input_ids=ids[:, done:],
                attention_mask=torch.ones_like(ids),
                pixel_values=later["pixel_values"],
                **{CACHE: cache},
                **options,
            )
            assert len(handle.report.kept[0]) == 4
            whole = torch.cat((ids[:, :done], out, text[:, -2:]), 1)
            more = built.generate(input_ids=whole, **{CACHE: cache}, **options)
        results.append(more)
    assert torch.equal(*results)
    assert handle.report.kept == [], "the last turn held no image"
    req = Request(later | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [16])
    with VisPruner(keep=4)(built) as handle:
        fresh = built.generate(**req.inputs, **options)
    assert torch.equal(fresh, results[0][:, : fresh.shape[1]])


def test_second_turn_takes_the_whole_conversations_pixels() -> None:
    """A processor that is given the whole chat brings the first image again."""
    built = model()
    two = request(built, [2])
    ids = two.inputs["input_ids"]
    begins = (ids[0] == IMAGE).nonzero()[16, 0] - 3  # the text before the second image
    options = {"do_sample": False, "max_new_tokens": 4}
    results = []
    with VisPruner(keep=4)(built):
        for pixels in (two.inputs["pixel_values"], two.inputs["pixel_values"][1:]):
            cache = DynamicCache(config=built.config.get_text_config())
            first = built.generate(
                input_ids=ids[:, :begins],
                pixel_values=two.inputs["pixel_values"][:1],
                **{CACHE: cache},
                **options,
            )
            whole = torch.cat((first, ids[:, begins:]), 1)
            results.append(
                built.generate(input_ids=whole, pixel_values=pixels, **{CACHE: cache}, **options)
            )
    assert torch.equal(*results)


def test_second_turn_refuses_another_prompt_and_beam_caches() -> None:
    built = model()
    req = request(built, [1])
    cache = DynamicCache(config=built.config.get_text_config())
    options = {"do_sample": False, "max_new_tokens": 3}
    with VisPruner(keep=4)(built):
        first = built.generate(**req.inputs, **{CACHE: cache}, **options)
        other = torch.cat((first, first[:, :2]), 1)
        other[0, 1] = 7 if other[0, 1] != 7 else 8
        with pytest.raises(VlmpruneError, match="do not begin with what"):
            built.generate(input_ids=other, **{CACHE: cache}, **options)
        beams = built.generate(**req.inputs, **options, num_beams=2, return_dict_in_generate=True)
        with pytest.raises(VlmpruneError, match="beam search"):
            built.generate(
                input_ids=torch.cat((beams.sequences, first[:, :2]), 1),
                **{CACHE: cache_of(beams)},
                **options,
            )


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


REFUSED: dict[str, Any] = {
    "assisted decoding": {"prompt_lookup_num_tokens": 2},
    "use_mtp": {"use_mtp": True},
    "guidance_scale=1.5": {"guidance_scale": 1.5},
    "cache_params is called": {"cache_params": object()},
    "inputs_embeds": {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 32)},
    "dimensions": {"attention_mask": torch.ones(1, 1, 4, 4)},
    "mm_encoder_outputs": {"mm_encoder_outputs": {"image": object()}},
}


def test_images_that_were_encoded_before_are_refused() -> None:
    """Without pixels, too: they would go through whole."""
    built = model()
    inputs = request(built, [1]).inputs
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        given = {"mm_encoder_outputs": {"image": built.get_image_features(pixels)}}
    with VisPruner(keep=4)(built):
        for call in (built, built.generate):
            with pytest.raises(VlmpruneError, match=r"^mm_encoder_outputs cannot be pruned"):
                call(**inputs, **given)


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_come_before_any_work(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    req = request(built, [1])

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder ran")

    with VisPruner(keep=4)(built):
        monkeypatch.setattr(built.model.vision_tower, "forward", encode)
        with pytest.raises(VlmpruneError, match=words) as caught:
            built.generate(**(req.inputs | REFUSED[words]), max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", ["crop", "image"])
def test_too_large_a_budget_is_refused_before_encoding(
    budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model()
    req = request(built, [1])
    monkeypatch.setattr(
        built.model.vision_tower, "forward", lambda *_, **__: pytest.fail("the encoder ran")
    )
    with (
        VisPruner(keep=17, budget=budget)(built),
        pytest.raises(VlmpruneError, match=r"keep=17 is more than the 16 visual tokens"),
    ):
        built.generate(**req.inputs, max_new_tokens=2)


def test_ids_and_pixels_that_do_not_fit_are_refused() -> None:
    built = model()
    req = request(built, [2])
    with VisPruner(keep=4)(built):
        cut = {k: req.inputs[k][:, :-12] for k in ("input_ids", "attention_mask")}
        with pytest.raises(VlmpruneError, match="placeholders"):
            built.generate(**(req.inputs | cut), max_new_tokens=2)
        text = {k: req.inputs[k][:, -4:] for k in ("input_ids", "attention_mask")}
        with pytest.raises(VlmpruneError, match="without image placeholders"):
            built.generate(**(req.inputs | text), max_new_tokens=2)


def test_a_mask_that_hides_placeholders_is_refused() -> None:
    built = model()
    req = request(built, [1, 1])
    mask = req.inputs["attention_mask"].clone()
    mask[0, (req.inputs["input_ids"][0] == IMAGE).nonzero()[3, 0]] = 0
    with (
        pytest.raises(VlmpruneError, match="attention_mask hides image placeholders"),
        VisPruner(keep=4)(built),
    ):
        built.generate(**(req.inputs | {"attention_mask": mask}), max_new_tokens=1)
