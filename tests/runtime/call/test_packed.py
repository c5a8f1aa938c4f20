"""Packed samples: each is pruned, and attended to, as if it came alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE
from packing import BY_ROW, alone, packed, samples
from sieve import Sieve
from vlmprune import (
    PLPHP,
    CDPruner,
    FastV,
    PyramidDrop,
    RandomTokens,
    Recall,
    VisPruner,
    VlmpruneError,
)
from zoo import ZOO
from zoo.base import IMAGE, Request

pytestmark = pytest.mark.oracle

# Family, positions, attention: eager adds the mask that SDPA may leave out.
CASES = [
    ("llava", "compact", "eager"),
    ("llava", "original", "eager"),
    ("llava", "original", "sdpa"),
    ("llava_onevision", "compact", "sdpa"),
    ("idefics3", "compact", "sdpa"),
    ("internvl", "original", "sdpa"),
    ("mistral3", "compact", "sdpa"),
    ("aya_vision", "compact", "sdpa"),
    ("qwen2_vl", "auto", "eager"),
    ("qwen2_5_vl", "auto", "sdpa"),
    ("qwen3_vl", "auto", "sdpa"),
]


def made(family: str, attention: str = "sdpa") -> tuple[Any, list[Request], dict[str, Any]]:
    entry = ZOO[family]
    built = entry.build(attention)
    images = [1, 1, 1] if entry.images_first else [1, 2, 1]
    requests = samples(entry, built, images)
    return built, requests, packed(built, requests, [3], entry.name in BY_ROW)


def singly(built: Any, handle: Any, requests: list[Request]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each sample by itself, and the kept tokens of its images."""
    logits, kept = list[Tensor](), list[Tensor]()
    for one in requests:
        logits.append(built(**alone(built, one)).logits)
        kept += handle.report.kept
    return logits, kept


@pytest.mark.parametrize(("family", "policy", "attention"), CASES)
@torch.no_grad()
def test_a_packed_sample_is_pruned_as_alone(family: str, policy: Any, attention: str) -> None:
    built, requests, inputs = made(family, attention)
    bare = built(**inputs).logits
    with RandomTokens(keep=1.0, positions=policy)(built):
        assert torch.equal(built(**inputs).logits, bare)
    with VisPruner(keep=0.4, positions=policy)(built) as handle:
        found, kept = built(**inputs).logits, handle.report.kept
        wanted, single = singly(built, handle, requests)
    assert all(torch.equal(a, b) for a, b in zip(kept, single, strict=True))
    both = torch.cat(wanted, dim=1)
    assert found.shape == both.shape and found.shape[1] < bare.shape[1]
    assert float((found - both).abs().max()) < TOLERANCE
    # Control: with a mask the host takes the row for one sample.
    mask = torch.ones_like(inputs["input_ids"])
    with VisPruner(keep=0.4, positions="original")(built):
        mixed = built(**inputs, attention_mask=mask).logits
    assert float((mixed - both)[:, wanted[0].shape[1] :].abs().max()) > DIFFERENT


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma3", "sdpa"), ("gemma4", "sdpa"), ("paligemma", "sdpa"), ("paligemma2", "eager")],
)
@torch.no_grad()
def test_samples_that_the_host_itself_mixes_are_refused(family: str, attention: str) -> None:
    """Hosts that see types read them across samples, each in some releases; the bare one tells."""
    built, requests, inputs = made(family, attention)
    bare = built(**inputs).logits
    singles = torch.cat([built(**alone(built, one)).logits for one in requests], dim=1)
    with RandomTokens(keep=1.0)(built):
        assert torch.equal(built(**inputs).logits, bare)
    with VisPruner(keep=0.4)(built) as handle:
        if float((bare - singles).abs().max()) > TOLERANCE:
            with pytest.raises(VlmpruneError, match="does not keep packed samples apart"):
                built(**inputs)
            return
        found = built(**inputs).logits
        wanted, _ = singly(built, handle, requests)
    assert float((found - torch.cat(wanted, dim=1)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("policy", ["compact", "original"])
@torch.no_grad()
def test_rows_of_several_samples(policy: Any) -> None:
    """Rows that are left unequal are padded on the left, and the padding mixes with nothing."""
    entry = ZOO["llava"]
    built = entry.build()
    requests = samples(entry, built, [1, 2, 1, 1], (3, 4, 5, 3))
    lengths = [one.inputs["input_ids"].shape[1] for one in requests]
    more = sum(lengths[:2]) - sum(lengths[2:])
    requests = samples(entry, built, [1, 2, 1, 1], (3, 4, 5, 3 + more))
    inputs = packed(built, requests, [2, 2])
    bare = built(**inputs).logits
    with RandomTokens(keep=1.0, positions=policy)(built):
        assert torch.equal(built(**inputs).logits, bare)
    with VisPruner(keep=3, positions=policy)(built) as handle:
        found = built(**inputs).logits
        wanted, _ = singly(built, handle, requests)
    for row, pair in enumerate((wanted[:2], wanted[2:])):
        both = torch.cat(pair, dim=1)[0]
        padding = found.shape[1] - len(both)
        assert bool(padding) == (row == 0)
        assert float((found[row, padding:] - both).abs().max()) < TOLERANCE


@torch.no_grad()
def test_a_method_that_reads_the_text_reads_that_of_the_sample() -> None:
    built, requests, inputs = made("llava")
    pruner = CDPruner(keep=5)
    with pruner(built) as handle:
        built(**inputs)
        kept = handle.report.kept
        _, single = singly(built, handle, requests)
        assert all(torch.equal(a, b) for a, b in zip(kept, single, strict=True))
        # Control: another text chooses otherwise.
        ids = requests[0].inputs["input_ids"]
        requests[0].inputs["input_ids"] = torch.where(ids == IMAGE, ids, ids.flip(1) // 2 + 60)
        built(**alone(built, requests[0]))
        assert not torch.equal(handle.report.kept[0], kept[0])


@torch.no_grad()
def test_labels_at_the_borders() -> None:
    """A sample's first column is predicted by none; whole rows keep the host's own loss."""
    entry = ZOO["llava"]
    built = entry.build()
    requests = samples(entry, built, [1, 2, 1])
    for one in requests:
        ids = one.inputs["input_ids"]
        one.inputs["labels"] = ids.masked_fill(ids == IMAGE, -100)
    inputs = packed(built, requests, [3])
    bare = built(**inputs).loss
    with RandomTokens(keep=1.0)(built):
        assert torch.equal(built(**inputs).loss, bare)
    with VisPruner(keep=3)(built):
        found = built(**inputs).loss
        losses = [built(**alone(built, one)).loss for one in requests]
    counts = [int((one.inputs["labels"][:, 1:] != -100).sum()) for one in requests]
    wanted = sum(a * n for a, n in zip(losses, counts, strict=True)) / sum(counts)
    assert float((found - wanted).abs()) < TOLERANCE
    assert float((found - bare).abs()) > DIFFERENT


@torch.no_grad()
def test_what_collators_add_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    built, requests, inputs = made("llava")
    lengths = [one.inputs["input_ids"].shape[1] for one in requests]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths)).int()[None]
    added = {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": numbers,
    }
    seen: dict[str, Any] = {}
    inner = built.get_decoder()
    inner.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with RandomTokens(keep=1.0)(built):
        built(**inputs, **added)
    assert all(torch.equal(torch.as_tensor(seen[k]), torch.as_tensor(v)) for k, v in added.items())
    with VisPruner(keep=3)(built) as handle:
        built(**inputs, **added)
        kept = [len(one) for one in handle.report.kept]
        gone = [sum(one.lengths) for one in requests]
        left = [
            n - before + after
            for n, before, after in zip(
                lengths, gone, (kept[0], sum(kept[1:3]), kept[3]), strict=True
            )
        ]
        assert seen["cu_seq_lens_q"].tolist() == torch.tensor([0, *left]).cumsum(0).tolist()
        assert torch.equal(seen["cu_seq_lens_k"], seen["cu_seq_lens_q"])
        assert seen["cu_seq_lens_q"].dtype == torch.int32
        assert seen["max_length_q"] == seen["max_length_k"] == max(left)
        assert seen["seq_idx"].tolist() == [[i for i, n in enumerate(left) for _ in range(n)]]

        def encode(*_: Any, **__: Any) -> None:
            raise AssertionError("the encoder ran")

        monkeypatch.setattr(built.model.vision_tower, "forward", encode)
        with pytest.raises(VlmpruneError, match=r"^cu_seq_lens_k says of packed samples something"):
            built(**inputs, **(added | {"cu_seq_lens_k": ends[[0, 2, 3]]}))
        mask = torch.ones_like(inputs["input_ids"])
        unpacked = inputs | {"attention_mask": mask}
        del unpacked["use_cache"]
        for name, value in added.items():
            for call in (built, built.generate):
                with pytest.raises(VlmpruneError, match=f"^{name} tells of packed samples"):
                    call(**unpacked, **{name: value})


@pytest.mark.parametrize(
    "method",
    [
        PLPHP(r=0.4),
        FastV(keep=4, layer=1),
        PyramidDrop(stages=2),
        Sieve(layers=(1,)),
        VisPruner(keep=4) | PLPHP(),
        Recall(),
    ],
    ids=repr,
)
def test_methods_inside_the_language_model_refuse(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, _, inputs = made("llava")

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(built.model.vision_tower, "forward", encode)
    with method(built), pytest.raises(VlmpruneError, match="cannot tell packed samples apart"):
        built(**inputs)


@torch.no_grad()
def test_what_the_host_does_not_keep_apart_is_refused() -> None:
    built, _, inputs = made("llava")
    filling = {k: v for k, v in inputs.items() if k != "use_cache"}
    with VisPruner(keep=3)(built), pytest.raises(VlmpruneError, match="pass use_cache=False"):
        built(**filling)

    built, requests, inputs = made("qwen2_vl")
    with VisPruner(keep=3)(built):
        for few in (inputs["position_ids"][1:], inputs["position_ids"][0]):
            with pytest.raises(VlmpruneError, match=r"pass \[4, batch, length\] position_ids"):
                built(**(inputs | {"position_ids": few}))
        # One sample's three rows start nowhere anew.
        one = alone(built, requests[1])
        same = built(**one).logits
        three = built(**(one | {"position_ids": one["position_ids"][1:]})).logits
        assert torch.equal(same, three)

    built, _, inputs = made("paligemma")
    with (
        VisPruner(keep=0.5, positions="original")(built),
        pytest.raises(VlmpruneError, match=r"use positions='compact'|keep packed samples apart"),
    ):
        built(**inputs)
