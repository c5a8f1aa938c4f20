"""Later turns of a conversation on a pruned cache, and caches that were there before the pruner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from answers import TOLERANCE
from stock import CACHE, cache_of
from tiny import IMAGE, Request, model, request
from tiny_oracle import oracle
from vlmprune import VisPruner, VlmpruneError

pytestmark = pytest.mark.oracle

# Each way with and without an image, alone and in a batch; families and policies take turns, so
# that each pair of any two settings is there.
WAYS = [
    ("llava", "compact", "whole", False, [1]),
    ("llava_next", "original", "whole", False, [1, 2]),
    ("llava_next", "compact", "whole", True, [1]),
    ("llava", "original", "whole", True, [1, 2]),
    ("llava_next", "original", "new ids", False, [1]),
    ("llava", "compact", "new ids", False, [1, 2]),
    ("llava", "original", "new ids", True, [1]),
    ("llava_next", "compact", "new ids", True, [1, 2]),
    ("llava", "original", "copied cache", False, [1]),
    ("llava_next", "compact", "copied cache", False, [1, 2]),
    ("llava_next", "original", "copied cache", True, [1]),
    ("llava", "compact", "copied cache", True, [1, 2]),
]


@pytest.mark.parametrize(("family", "policy", "how", "new_image", "rows"), WAYS)
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
        with pytest.raises(
            VlmpruneError, match=r"^this cache cannot be continued: it .* beam search"
        ):
            built.generate(
                input_ids=torch.cat((beams.sequences, first[:, :2]), 1),
                **{CACHE: cache_of(beams)},
                **options,
            )


@torch.no_grad()
def test_a_turn_that_does_not_go_with_its_cache_is_refused() -> None:
    """Of other rows, or with a mask that counts the columns that were pruned as gone."""
    built = model()
    req = request(built, [1])
    with VisPruner(keep=4)(built):
        cache = cache_of(built(**req.inputs, use_cache=True))
        ids = req.inputs["input_ids"]
        length, held = ids.shape[1], cache.get_seq_length()
        assert held < length
        said = f"has {held + 2} columns where {length + 2} are due: {length} of the cache"
        with pytest.raises(VlmpruneError, match=f"attention_mask {said}.* and 2 new ones"):
            built(
                ids[:, :2],
                attention_mask=torch.ones(1, held + 2, dtype=torch.long),
                **{CACHE: cache},
            )
        with pytest.raises(VlmpruneError, match="ids have 3 rows but the cache was filled with 1"):
            built(
                ids[:, :2].expand(3, -1),
                attention_mask=torch.ones(3, length + 2, dtype=torch.long),
                **{CACHE: cache},
            )


@pytest.mark.parametrize("policy", ["compact", "original"])
@torch.no_grad()
def test_a_row_that_brings_padding_alone_stays_where_it_was(policy: Any) -> None:
    """What it says next is what it says without that turn."""
    built = model()
    req = request(built, [1, 1])
    pruner = VisPruner(keep=4, positions=policy)

    def next_said(rows: slice, waits: bool) -> Tensor:
        """Logits behind one token more; with a turn in between that the last row skips."""
        own = {name: one[rows] for name, one in req.inputs.items()}
        ids, mask = own["input_ids"], own["attention_mask"]
        cache = DynamicCache(config=built.config.get_text_config())
        built.generate(**own, **{CACHE: cache}, max_new_tokens=1)
        for new in ([13, 14, 15], [17]) if waits else ([17],):
            more = torch.tensor([new]).expand(len(ids), -1)
            real = torch.ones_like(more)
            if len(new) > 1:
                real[-1] = 0
            ids, mask = torch.cat((ids, more), dim=1), torch.cat((mask, real), dim=1)
            out = built.generate(
                input_ids=ids,
                attention_mask=mask,
                **{CACHE: cache},
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.logits[0][-1]

    with pruner(built):
        alone = next_said(slice(1, 2), waits=False)
        beside = next_said(slice(0, 2), waits=True)
        first = next_said(slice(0, 1), waits=False)
    assert float((alone - beside).abs().max()) < TOLERANCE
    assert float((alone - first).abs().max()) > 0.01
