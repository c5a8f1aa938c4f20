"""VideoLLM-MoD: its choice, its gradients, its folder and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance
from deep import deep, generate
from stock import cache_of
from tiny import IMAGE, request
from vlmprune import MoD, VlmpruneError, embedded
from vlmprune.draw import layer_map
from vlmprune.select.routing import routed
from vlmprune.study.evals import run as evaluate

# By hand.


def test_the_best_of_each_frame() -> None:
    """Worked out on paper: the score is 2·first - second + 1."""
    hidden = torch.tensor([[[1.0, 0], [0, 1], [3, 1], [2, 2], [0, 0], [9, 9]]])
    frames = torch.tensor([[0, 0, 0, 1, 1, -1]])
    counts = torch.tensor([[3, 2]])
    weight, bias = torch.tensor([2.0, -1.0]), torch.tensor(1.0)
    for keep, wanted in (
        (1, [[0, 0, 1, 1, 0, 0]]),
        (2, [[1, 0, 1, 1, 1, 0]]),
        (9, [[1, 1, 1, 1, 1, 0]]),
        # 0.5 of three is 1.5, rounded up; of two it is one.
        (0.5, [[1, 0, 1, 1, 0, 0]]),
        (0.01, [[0, 0, 1, 1, 0, 0]]),
    ):
        kept, scores = routed(hidden, weight, bias, frames, counts, keep)
        assert kept.int().tolist() == wanted
    assert scores.tolist() == [[3.0, 0.0, 6.0, 3.0, 1.0, 10.0]]
    # In float32 whatever else runs in less: bfloat16 cannot tell 1.000 from 1.001.
    close = torch.tensor([[[0.0, 0], [0.0005, 0], [0.001, 0]]])
    with torch.autocast("cpu", torch.bfloat16):
        kept, scores = routed(close, weight, bias, frames[:, :3], counts, 1)
    assert kept.int().tolist() == [[0, 0, 1]] and scores.dtype == torch.float32
    # Ties go to the lower index.
    kept, _ = routed(hidden[:, :1].expand(1, 6, 2), weight, bias, frames, counts, 1)
    assert kept.int().tolist() == [[1, 0, 0, 1, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_frames_do_not_compete(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """A share of each frame, and the same whatever the other frames hold, or hold later."""
    keep: Any = data.draw(st.one_of(st.integers(1, 5), st.floats(0.05, 1.0)))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, sum(sizes), 3, generator=generator)
    weight, bias = torch.randn(3, generator=generator), torch.tensor(0.5)
    frames = torch.tensor([[f for f, n in enumerate(sizes) for _ in range(n)]])
    kept, _ = routed(hidden, weight, bias, frames, torch.tensor([sizes]), keep)
    start = 0
    for frame, n in enumerate(sizes):
        one = slice(start, start + n)
        alone, _ = routed(
            hidden[:, one], weight, bias, frames[:, one] * 0, torch.tensor([[n]]), keep
        )
        assert torch.equal(alone, kept[:, one])
        count = min(n, keep) if isinstance(keep, int) else max(1, int(keep * n + 0.5 + 1e-4))
        assert int(kept[0, one].sum()) == count
        start += n
        before = frames[:, :start], torch.tensor([sizes[: frame + 1]])
        sofar, _ = routed(hidden[:, :start], weight, bias, *before, keep)
        assert torch.equal(sofar, kept[:, :start])


# On a model.


def trained(built: Any, seed: int = 0, **hyper: Any) -> MoD:
    """Routers whose scores are far from one, as if trained."""
    made = MoD.fresh(built, **hyper)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return made


@torch.no_grad()
def test_a_forward_equals_plain_loops() -> None:
    """One prompt of two images: each layer on all rows, skipped keys masked, states put back."""
    built = deep("eager")
    req = request(built, [2])
    method = trained(built, keep=0.3)
    with method(built) as handle:
        found = built(**req.inputs).logits[0]
    ids = req.inputs["input_ids"][0]
    visual = (ids == IMAGE).nonzero()[:, 0]

    def plain(weighted: bool = True, keys_too: bool = False) -> Tensor:
        decoder = built.get_decoder()
        hidden = built.get_input_embeddings()(ids).clone()
        pixels = req.inputs["pixel_values"]
        features = built.get_image_features(pixel_values=pixels).pooler_output
        hidden[visual] = torch.cat(list(features))
        count, low = len(ids), torch.finfo(torch.float32).min
        angles = decoder.rotary_emb(hidden[None], position_ids=torch.arange(count)[None])
        for index, layer in enumerate(decoder.layers):
            mask = torch.full((count, count), low).triu(1)
            factor = torch.ones(count)
            if index in (1, 3):
                router = method.module.get_submodule(f"routers.{index}")
                score = hidden @ router.weight[0] + router.bias[0]
                for frame in visual.view(2, 16).tolist():
                    ranked = sorted(frame, key=lambda i: (-float(score[i]), i))
                    for place in ranked[:5]:
                        factor[place] = score[place] if weighted else 1.0
                    for place in ranked[5:]:
                        factor[place] = 0.0
                        if not keys_too:
                            mask[:, place] = low
            out = layer(hidden[None], attention_mask=mask[None, None], position_embeddings=angles)
            out = (out[0] if isinstance(out, tuple) else out)[0]
            hidden = torch.where(
                factor[:, None] == 1.0, out, hidden + factor[:, None] * (out - hidden)
            )
        logits: Tensor = built.lm_head(decoder.norm(hidden))
        return logits

    assert float((found - plain()).abs().max()) < TOLERANCE
    for control in (plain(weighted=False), plain(keys_too=True), built(**req.inputs).logits[0]):
        assert float((found - control).abs().max()) > DIFFERENT
    assert handle.report is not None
    assert [len(k) for k in handle.report.layers[1].kept] == [5, 5]


def test_gradients_reach_the_routers_alone() -> None:
    """Of a frozen model; every router of a layer learns from what comes behind it."""
    built = deep().requires_grad_(False)
    req = request(built, [2, 1])
    method = trained(built)
    labels = req.inputs["input_ids"].masked_fill(req.inputs["input_ids"] == IMAGE, -100)
    with method(built):
        loss = built(**req.inputs, labels=labels).loss
    loss.backward()
    assert all(weight.grad is None for weight in built.parameters())
    grads = {name: weight.grad for name, weight in method.module.named_parameters()}
    assert sorted(grads) == sorted(
        f"routers.{layer}.{part}" for layer in (1, 3) for part in ("weight", "bias")
    )
    assert all(grad is not None and float(grad.abs().max()) > 1e-6 for grad in grads.values())
    # As a small step says.
    router = method.module.get_submodule("routers.3")
    assert isinstance(router, torch.nn.Linear)
    with torch.no_grad(), method(built):
        ends = []
        for step in (1e-2, -2e-2):
            router.bias += step
            ends.append(float(built(**req.inputs, labels=labels).loss))
    slope = (ends[0] - ends[1]) / 2e-2
    grad = grads["routers.3.bias"]
    assert grad is not None and abs(slope - float(grad)) < 0.02 * abs(slope) + 1e-4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_gradients_reach_the_lora_too() -> None:
    """And nothing else; a LoRA that was trained acts where the method is attached."""
    peft = pytest.importorskip("peft")
    built = deep()
    req = request(built, [2, 1])
    plain = generate(built, req.inputs)
    method = trained(built)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)")
    wrapped = peft.get_peft_model(built, config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    labels = req.inputs["input_ids"].masked_fill(req.inputs["input_ids"] == IMAGE, -100)
    method.module.train()
    with method(wrapped):
        wrapped(**req.inputs, labels=labels).loss.backward()
        wanted = generate(wrapped, req.inputs)
    touched = {n for n, w in wrapped.named_parameters() if w.grad is not None}
    assert touched == {n for n, _ in wrapped.named_parameters() if "lora_" in n}
    assert all(w.grad is not None for w in method.module.parameters())
    # The routed layers' LoRA is reached through tokens that go through them.
    for name, weight in wrapped.named_parameters():
        if "layers.3." in name and "lora_A" in name:
            assert weight.grad is not None and float(weight.grad.abs().max()) > 1e-7
    method.take_lora(wrapped)
    built = wrapped.unload()
    built.requires_grad_(True)
    with method(built):
        assert distance(generate(built, req.inputs), wanted) < TOLERANCE
    assert distance(generate(built, req.inputs), plain) == 0 < DIFFERENT < distance(wanted, plain)


def test_a_folder_holds_all(tmp_path: Path) -> None:
    built = deep()
    req = request(built, [2])
    method = trained(built, keep=3, every=3)
    assert method.settings == {"keep": 3, "layers": [1, 4], "language": 32}
    method.save_pretrained(tmp_path)
    again = MoD(weights=str(tmp_path))
    with method(built):
        first = generate(built, req.inputs)
    with again(built) as handle:
        assert distance(generate(built, req.inputs), first) == 0
    assert handle.report is not None
    assert [len(k) for k in handle.report.layers[4].kept] == [3, 3]
    assert "2 of 5 layers on 6 of them" in str(handle.report)
    with pytest.raises(VlmpruneError, match="are for another model"):
        again.attach(deep(layers=6))


def test_an_untrained_router_leaves_layers_nearly_as_they_are() -> None:
    built = deep()
    req = request(built, [2])
    torch.manual_seed(0)
    with MoD.fresh(built, keep=1.0)(built):
        whole = generate(built, req.inputs)
    plain = generate(built, req.inputs)
    assert distance(whole, plain) < 0.1
    with MoD.fresh(built, keep=0.2)(built):
        assert distance(generate(built, req.inputs), plain) > DIFFERENT


def test_numpy_integers_count_tokens_of_a_frame() -> None:
    found = MoD.fitted(deep(), keep=np.int64(3))
    assert found["keep"] == 3 and type(found["keep"]) is int


@pytest.mark.parametrize(
    ("hyper", "match"),
    [
        ({"keep": 0}, "keep=0 leaves no visual tokens"),
        ({"keep": 1.5}, r"keep=1.5 is a fraction outside"),
        ({"every": 0}, "every=0 is not a whole number"),
        ({"first": 0}, "first=0 is not a whole number"),
        ({"first": 5}, "MoD needs 6 decoder layers or more and this model has 5"),
        ({"window": 4}, "window=4 is no setting of mod; it has keep, every, first"),
    ],
)
def test_refusals(hyper: dict[str, Any], match: str) -> None:
    with pytest.raises(VlmpruneError, match=match):
        MoD.fresh(deep(), **hyper)


@torch.no_grad()
def test_what_it_saves_on_a_clip() -> None:
    """The embedded model on four frames of 64 tokens: bytes by layer, told and measured."""
    from PIL import Image

    model, processor = embedded.load()
    frames = [Image.new("RGB", (112, 112), (60 * i, 90, 120)) for i in range(4)]
    inputs = processor(
        text="USER: <image><image><image><image>\nwhere is the cat in picture four? ASSISTANT:",
        images=frames,
        size={"height": 112, "width": 112},
        return_tensors="pt",
    )
    plain = cache_of(model(**inputs))
    with MoD.fresh(model)(model) as handle:
        cache = cache_of(model(**inputs))
    report = handle.report
    assert report is not None
    assert [sum(map(len, one.kept)) for one in report.layers] == [256, 52, 256, 52, 256]
    each = 2 * 3 * 32 * 4
    for mine, theirs, told in zip(cache.layers, plain.layers, report.layers, strict=True):
        saved = theirs.keys.nbytes + theirs.values.nbytes - mine.keys.nbytes - mine.values.nbytes
        assert saved == 256 * each - told.kv_bytes
    assert report.kv_bytes_after / report.kv_bytes_before == (3 * 256 + 2 * 52) / (5 * 256)
    assert report.flops_after < report.flops_before
    # What pages and tables make of it.
    assert layer_map.reached(report, 5) == [256, 52, 256, 52, 256]
    assert evaluate._mean_tokens(report, 5) == (3 * 256 + 2 * 52) / 5
    for number, roles in enumerate(report.roles):
        either = set(report.layers[1].kept[number].tolist())
        either |= set(report.layers[3].kept[number].tolist())
        assert set(roles["important"].nonzero()[:, 0].tolist()) == either
    assert report.decoder_flops_after < 0.7 * report.decoder_flops_before
