"""Dropping rows in all the ways in which a model is called; what it refuses; caches afterwards."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from answers import DIFFERENT, TOLERANCE, distance
from deep import Ordered, deep, dropped_by_layer, generate, hooks
from hidden import hiding
from stock import CACHE, cache_of, repeats_rows
from tiny import IMAGE, Request, dropped_columns, request
from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.methods import FastV, PyramidDrop
from vlmprune.runtime.cache.gapped_layer import GappedLayer
from vlmprune.views import RowView

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize(
    "more",
    [
        # A placeholder that was chosen would ask for features of its own.
        {"num_beams": 3, "num_return_sequences": 2, "suppress_tokens": [IMAGE]},
        {"do_sample": True, "num_return_sequences": 2, "suppress_tokens": [IMAGE]},
    ],
)
def test_beams_and_samples(policy: Any, more: dict[str, Any]) -> None:
    """Rows are repeated and reordered; each sample's choice goes with it."""
    built = deep()
    # Older releases mix up the images of such rows by themselves.
    right = repeats_rows(built, request(built, [2, 1, 0]).inputs)
    req = request(built, [2 if right else 1, 1, 0])

    def ran(**other: Any) -> Any:
        torch.manual_seed(3)
        return generate(built, req.inputs, **more, **other)

    with FastV(keep=5, positions=policy)(built) as handle:
        pruned = ran()
        # Without a cache every step drops anew, and must come to the same.
        again = ran(use_cache=False)
    assert handle.report is not None and len(pruned.sequences) == 6
    assert handle.report.visual_tokens_after == 5 * len(req.lengths)
    assert torch.equal(pruned.sequences, again.sequences)
    assert distance(pruned, again) < TOLERANCE
    with hiding(built, dropped_by_layer(req, handle.report)):
        expected = ran()
    if policy == "original":
        assert torch.equal(pruned.sequences, expected.sequences)
        assert distance(pruned, expected) < TOLERANCE
    else:
        assert distance(pruned, expected) > DIFFERENT
    assert distance(pruned, ran()) > DIFFERENT


def turns_of(built: Any) -> list[Request]:
    """Two turns with images, and one of text alone, each padded by itself."""
    return [
        request(built, [1, 2], seed=1),
        request(built, [2, 0], seed=2),
        request(built, [0, 0], text=[4, 2]),
    ]


@torch.no_grad()
@pytest.mark.parametrize("pruner", [FastV(keep=4), PyramidDrop(positions="original")])
def test_later_turns_with_and_without_images(pruner: Any) -> None:
    """Only a turn's own images are dropped from, and what earlier ones dropped stays away."""
    built = deep()
    turns = turns_of(built)
    masks = [torch.cat([t.inputs["attention_mask"] for t in turns[:n]], 1) for n in (1, 2, 3)]
    cache, full, plain = (DynamicCache(config=built.config) for _ in range(3))
    got, seen, total = [], list[dict[int, Tensor]](), 0
    held = {layer: torch.zeros(2, 0, dtype=torch.bool) for layer in range(5)}
    with pruner(built) as handle:
        for turn, mask in zip(turns, masks, strict=True):
            given = turn.inputs | {"attention_mask": mask}
            got.append(built(**given, **{CACHE: cache}).logits)
            assert handle.report is not None
            here = dropped_by_layer(turn, handle.report) if turn.lengths else {}
            nothing = torch.zeros_like(turn.inputs["input_ids"], dtype=torch.bool)
            held = {n: torch.cat((one, here.get(n, nothing)), 1) for n, one in held.items()}
            seen.append(held)
    for turn, mask, pruned, hidden in zip(turns, masks, got, seen, strict=True):
        given = turn.inputs | {"attention_mask": mask}
        with hiding(built, hidden, held=total):
            expected = built(**given, **{CACHE: full}).logits
        other = built(**given, **{CACHE: plain}).logits
        going = turn.inputs["attention_mask"].bool() & ~hidden[4][:, total:]
        assert float((pruned - expected)[going].abs().max()) < TOLERANCE
        assert float((pruned - other)[going].abs().max()) > DIFFERENT
        total += mask.shape[1] - total
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored[0] == total > stored[4]
    assert [layer.get_seq_length() for layer in cache.layers] == [total] * 5


@torch.no_grad()
def test_later_turns_renumber_too() -> None:
    """Compact: a turn after the other equals both at once, where the second has no image."""
    built = deep()
    first, second = request(built, [2, 1]), request(built, [0, 0], text=[6, 6], seed=5)
    second.inputs = {k: v[:, -6:] for k, v in second.inputs.items()}
    both = {k: torch.cat((first.inputs[k], v), dim=1) for k, v in second.inputs.items()}
    cache = DynamicCache(config=built.config)
    for policy in ("compact", "original"):
        with Ordered(positions=policy)(built):
            whole = built(**first.inputs | both).logits[:, -6:]
            cache = DynamicCache(config=built.config)
            built(**first.inputs, **{CACHE: cache})
            given = {"input_ids": second.inputs["input_ids"], CACHE: cache}
            later = built(**given, attention_mask=both["attention_mask"]).logits
        assert float((whole - later).abs().max()) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_what_can_be_done_to_a_cache(policy: Any) -> None:
    """Copied, cropped, narrowed, repeated: it goes on as a fresh run of the same rows does."""
    built = deep()
    req = request(built, [2, 1, 0])
    with PyramidDrop(positions=policy)(built):
        out = generate(built, req.inputs)
        ids, cache = out.sequences, cache_of(out)
        short = cache.layers[4]
        assert isinstance(short, GappedLayer) and short.held is not None
        assert short.nbytes() < cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
        size = req.inputs["input_ids"].shape[1]

        def step(past: Any, rows: list[int], at: int) -> Tensor:
            """Logits of the token at a place, on a cache of what is before it."""
            mask = torch.cat((req.inputs["attention_mask"], torch.ones(3, at + 1 - size)), dim=1)
            given = {"attention_mask": mask[rows].long(), CACHE: past}
            logits: Tensor = built(input_ids=ids[rows, at : at + 1], **given).logits[:, 0]
            return logits

        for back, rows in ((0, [0, 1, 2]), (3, [0, 1, 2])):
            past = copy.deepcopy(cache)
            past.crop(-back)
            at = ids.shape[1] - 1 - back
            if back:
                wanted = out.logits[at + 1 - size][rows]
                assert float((step(past, rows, at) - wanted).abs().max()) < TOLERANCE
            else:
                assert step(past, rows, at).isfinite().all()
        # Layers by themselves: narrowed, repeated, moved, cropped into the prompt, reset.
        layer = copy.deepcopy(short)
        layer.batch_select_indices(torch.tensor([2, 0]))
        assert torch.equal(layer.keys, short.keys[[2, 0]])
        assert torch.equal(layer.held, short.held[[2, 0]])
        layer.batch_repeat_interleave(2)
        assert torch.equal(layer.keys, short.keys[[2, 2, 0, 0]])
        layer.reorder_cache(torch.tensor([3, 0]))
        assert torch.equal(layer.values, short.values[[0, 2]])
        layer.offload()
        layer.prefetch()
        length = 30
        layer.crop(length - layer.get_seq_length())
        assert layer.get_seq_length() == length
        columns = short.columns(short.keys.device)[[0, 2]]
        for row, (mine, before) in enumerate(zip(layer.held, columns, strict=True)):
            wanted = (before >= 0) & (before < length)
            assert mine[mine >= 0].tolist() == before[wanted].tolist()
            assert torch.equal(layer.keys[row][:, mine >= 0], short.keys[[0, 2]][row][:, wanted])
        with pytest.raises(VlmpruneError, match="crop\\(3\\) on a cache that lacks columns"):
            layer.crop(3)
        layer.reset()
        assert layer.get_seq_length() == layer.nbytes() == 0
        layer.update(short.keys, short.values)
        assert layer.get_seq_length() == short.stored
    with pytest.raises(VlmpruneError, match="continue it with the pruner attached"):
        built(input_ids=ids[:, -1:], **{CACHE: copy.deepcopy(cache)})
    # Any pruner can go on with it.
    with VisPruner(keep=3)(built):
        past = copy.deepcopy(cache)
        past.crop(-3)
        at = ids.shape[1] - 4
        assert (
            float((step(past, [0, 1, 2], at) - out.logits[at + 1 - size]).abs().max()) < TOLERANCE
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_gradients_and_hidden_states(side: str) -> None:
    """As masking has them; hidden states have their usual shape."""
    built = deep()
    req = request(built, [2, 1, 0], side=side)
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"].bool()
    # The token behind a dropped one is predicted from what that one left with, and the first from
    # padding, so neither is asked here.
    after = torch.roll((ids == IMAGE) | ~mask, 1, dims=1)
    labels = ids.masked_fill(~mask | (ids == IMAGE) | after, -100)
    given = req.inputs | {"labels": labels}

    def ran() -> tuple[Any, dict[str, Tensor]]:
        built.zero_grad()
        out = built(**given, output_hidden_states=True)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
        return out, grads

    built.train()
    with FastV(keep=4)(built) as handle:
        pruned, grads = ran()
    assert handle.report is not None
    dropped = dropped_by_layer(req, handle.report)
    with hiding(built, dropped):
        expected, wanted = ran()
    plain, others = ran()
    assert (
        abs(float((pruned.loss - expected.loss).detach()))
        < TOLERANCE
        < abs(float((pruned.loss - plain.loss).detach()))
    )
    assert grads.keys() == wanted.keys()
    assert max(float((grads[n] - wanted[n]).abs().max()) for n in grads) < 1e-4
    assert max(float((grads[n] - others[n]).abs().max()) for n in grads) > DIFFERENT
    going = mask & ~dropped[4]
    assert len(pruned.hidden_states) == len(expected.hidden_states) == 6
    for mine, theirs in zip(pruned.hidden_states, expected.hidden_states, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).detach()[going].abs().max()) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_behind_a_pruner_before_the_language_model(attention: str) -> None:
    """Each chooses among what the one before it keeps; the report counts from the beginning."""
    built = deep(attention)
    req = request(built, [2, 1, 0])
    with (VisPruner(keep=8, positions="original") | FastV(keep=0.5))(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.visual_tokens_after == 12
    with VisPruner(keep=8, positions="original")(built) as alone:
        generate(built, req.inputs)
    assert alone.report is not None
    first = dropped_columns(req, alone.report.kept)
    mask = req.inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = req.inputs | {"attention_mask": mask * ~first, "position_ids": positions}
    with hiding(built, dropped_by_layer(req, report)):
        expected = generate(built, given)
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, generate(built, given)) > DIFFERENT


def test_the_last_token_goes_on_even_where_it_is_visual() -> None:
    """The first new token is made of its state."""
    built = deep()
    req = request(built, [1], text=0)
    for name in ("input_ids", "attention_mask"):
        req.inputs[name] = req.inputs[name][:, :-3]
    assert req.inputs["input_ids"][0, -1] == IMAGE
    with FastV(keep=2)(built) as handle:
        pruned = generate(built, req.inputs)
    assert handle.report is not None and 15 in handle.report.kept[0].tolist()
    with hiding(built, dropped_by_layer(req, handle.report)):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE


def test_nothing_stays_on_the_model() -> None:
    """Neither after a call nor after a failure inside it."""
    built = deep()
    req = request(built, [2, 1, 0])
    generate(built, req.inputs)
    before, registered = hooks(built), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    class Failing(PyramidDrop):
        def drop(self, layer: int, view: RowView) -> Any:
            if layer == 3:
                raise RuntimeError("on purpose")
            return super().drop(layer, view)

    for pruner, error in ((FastV(keep=4), None), (Failing(), "on purpose")):
        with pruner(built):
            if error is None:
                generate(built, req.inputs)
            else:
                with pytest.raises(RuntimeError, match=error):
                    generate(built, req.inputs)
        assert hooks(built) == before
        assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == registered


def test_threads_do_not_meet() -> None:
    """Two calls at once on one model, each with its own prompt."""
    built = deep()
    reqs = [request(built, images, seed=9) for images in ([2, 1], [1], [1, 0, 3])]
    found: list[Any] = [None] * len(reqs)
    with FastV(keep=4)(built):
        alone = [generate(built, req.inputs) for req in reqs]

        def run(number: int) -> None:
            for _ in range(3):
                found[number] = generate(built, reqs[number].inputs)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(reqs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, wanted in zip(found, alone, strict=True):
        assert distance(mine, wanted) == 0


def test_refusals() -> None:
    built = deep()
    req = request(built, [1])
    for pruner, match in (
        (FastV(keep=4, layer=5), "before decoder layer 5, and .* has layers 1 to 4"),
        (PyramidDrop(stages=5), "needs 6 decoder layers or more and this model has 5"),
    ):
        with pytest.raises(VlmpruneError, match=match):
            pruner.attach(built)
    for chained, match in (
        ((FastV(keep=4), PyramidDrop()), "would both drop tokens between decoder layers"),
        ((FastV(keep=4), PLPHP()), "cannot cut; chain only one"),
        ((FastV(keep=4), VisPruner(keep=4)), "inside the language model and must come last"),
    ):
        with pytest.raises(VlmpruneError, match=match):
            chained[0] | chained[1]
    with pytest.raises(VlmpruneError, match="layer=0 has no layer before it"):
        FastV(keep=4, layer=0)
    with pytest.raises(VlmpruneError, match="ratio=2 is outside"):
        PyramidDrop(ratio=2)
    with pytest.raises(VlmpruneError, match="stages=0 is no number"):
        PyramidDrop(stages=0)
    for pruner in (FastV(keep=4), PyramidDrop()):
        with pruner(built) as handle, pytest.raises(VlmpruneError, match="nothing to store"):
            handle.encode(**req.inputs)
    static = StaticCache(config=built.config, max_cache_len=64)
    with FastV(keep=4)(built):
        for more, match in (
            ({CACHE: static}, "cannot leave columns out of a StaticCache"),
            ({"cache_implementation": "static"}, "cache_implementation='static'"),
            ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
            ({"output_attentions": True}, "leave out output_attentions"),
        ):
            with pytest.raises(VlmpruneError, match=match):
                generate(built, req.inputs, **more)
