"""Attaching, detaching, chaining and reporting."""

from __future__ import annotations

import gc
import inspect
import json
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny import dropped_columns, model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError, costs
from vlmprune.hosts.families import FAMILIES, TOWERS

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def fingerprint(built: nn.Module) -> Any:
    """All that attaching could leave behind: attributes, hooks, registered functions."""
    modules = []
    for name, module in built.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if callable(v)}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        modules.append((name, sorted(vars(module)), own, hooks))
    registry = {k: id(v) for k, v in ALL_ATTENTION_FUNCTIONS.items()}
    return modules, registry, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)


def test_detaching_gives_the_model_back() -> None:
    built = model()
    req = request(built, [1])
    before, plain = fingerprint(built), built.generate(**req.inputs, **OPTIONS)
    handle = VisPruner(keep=4).attach(built)
    assert fingerprint(built) != before
    assert repr(handle).endswith(f"{handle.pruner!r} on LlavaForConditionalGeneration)")
    assert built.generate(**req.inputs, **OPTIONS).shape == plain.shape
    handle.detach()
    handle.detach()
    assert fingerprint(built) == before
    assert torch.equal(built.generate(**req.inputs, **OPTIONS), plain)


@pytest.mark.parametrize("where", ["in the block", "in the tower", "in the decoder"])
def test_an_exception_restores_the_model(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    req = request(built, [1])
    before, plain = fingerprint(built), built.generate(**req.inputs, **OPTIONS)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        if where == "in the tower":
            patch.setattr(
                built.model.vision_tower.encoder.layers[1].self_attn.v_proj, "forward", fail
            )
        if where == "in the decoder":
            patch.setattr(built.model.language_model.layers[1], "forward", fail)
        with VisPruner(keep=4)(built):
            if where == "in the block":
                fail()
            built.generate(**req.inputs, **OPTIONS)
    assert fingerprint(built) == before
    assert torch.equal(built.generate(**req.inputs, **OPTIONS), plain)


def test_a_pruner_goes_on_after_an_exception() -> None:
    built = model()
    req = request(built, [1])
    with VisPruner(keep=4)(built):
        expected = built.generate(**req.inputs, **OPTIONS)
        with pytest.raises(VlmpruneError):
            built.generate(**req.inputs, **OPTIONS, prompt_lookup_num_tokens=2)
        assert torch.equal(built.generate(**req.inputs, **OPTIONS), expected)


def counted(built: nn.Module, req: Any, pruner: VisPruner) -> int:
    """Visual tokens that the language model sees, from the shape of a plain forward."""
    with torch.no_grad():
        return built(**req.inputs).logits.shape[1] - int((req.inputs["input_ids"] != 5).sum())


def test_nested_the_innermost_acts() -> None:
    built = model()
    req = request(built, [1])
    outer, inner = VisPruner(keep=8), VisPruner(keep=3)
    with outer(built):
        assert counted(built, req, outer) == 8
        with inner(built):
            assert counted(built, req, inner) == 3
        assert counted(built, req, outer) == 8
        with inner(built), inner(built):
            assert counted(built, req, inner) == 3
    assert counted(built, req, outer) == 16


def test_detached_in_any_order() -> None:
    built = model()
    req = request(built, [1])
    before = fingerprint(built)
    first, second, third = (VisPruner(keep=k).attach(built) for k in (2, 5, 9))
    first.detach()
    assert counted(built, req, VisPruner(9)) == 9
    third.detach()
    assert counted(built, req, VisPruner(5)) == 5
    second.detach()
    assert fingerprint(built) == before


def test_one_pruner_on_two_models_interleaved() -> None:
    one, two = model(seed=1), model("llava_next", seed=2)
    pruner = VisPruner(keep=4)
    requests = [request(one, [1]), request(two, [1])]
    alone = []
    for built, req in zip((one, two), requests, strict=True):
        with pruner(built):
            alone.append(built.generate(**req.inputs, **OPTIONS))
    with pruner(one) as a, pruner(two) as b:
        for _ in range(2):
            assert torch.equal(one.generate(**requests[0].inputs, **OPTIONS), alone[0])
            assert torch.equal(two.generate(**requests[1].inputs, **OPTIONS), alone[1])
    assert len(a.report.kept[0]) == 4 < len(b.report.kept[0])
    # Another setting on the second model must not touch the first.
    with pruner(one), VisPruner(keep=1)(two):
        assert torch.equal(one.generate(**requests[0].inputs, **OPTIONS), alone[0])
        assert counted(two, requests[1], pruner) < len(b.report.kept[0])


def test_one_model_inside_anothers_generate() -> None:
    """A call under way on one model leaves the features of another alone."""
    one, two = model(seed=1), model(seed=2)
    req = request(one, [1])
    seen: list[int] = []

    def look(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        features = two.get_image_features(pixel_values=req.inputs["pixel_values"])
        seen.append(len(features.pooler_output[0]))
        seen.append(counted(two, req, VisPruner(3)))
        return torch.zeros(len(ids), dtype=torch.bool)

    with VisPruner(keep=4)(one), VisPruner(keep=3)(two):
        alone = one.generate(**req.inputs, **OPTIONS)
        criteria = StoppingCriteriaList([look])
        assert torch.equal(one.generate(**req.inputs, **OPTIONS, stopping_criteria=criteria), alone)
    assert seen == [16, 3] * OPTIONS["max_new_tokens"]


def test_two_threads_on_one_model() -> None:
    built = model()
    requests = [request(built, [1], text=3 + i, seed=i) for i in range(4)]
    results: dict[int, Tensor] = {}
    with VisPruner(keep=4)(built):
        expected = [built.generate(**r.inputs, **OPTIONS) for r in requests]

        def work(i: int) -> None:
            for _ in range(5):
                results[i] = built.generate(**requests[i].inputs, **OPTIONS)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


def test_a_detached_model_can_be_collected() -> None:
    built = model()
    pruner = VisPruner(keep=4)
    with pruner(built):
        built.generate(**request(built, [1]).inputs, **OPTIONS)
    gone = weakref.ref(built)
    del built
    gc.collect()
    assert gone() is None
    assert pruner.report is not None and pruner.report.visual_tokens_after == 4


def test_signatures_stay() -> None:
    built = model()
    before = {n: inspect.signature(getattr(built, n)) for n in ("generate", "forward")}
    with VisPruner(keep=4)(built):
        assert {n: inspect.signature(getattr(built, n)) for n in before} == before


def test_features_asked_for_directly_are_whole() -> None:
    built = model()
    req = request(built, [1])
    with VisPruner(keep=4)(built):
        features = built.get_image_features(pixel_values=req.inputs["pixel_values"]).pooler_output
    assert len(features[0]) == 16


def test_chain_narrows() -> None:
    built = model()
    req = request(built, [1])
    wide, narrow = VisPruner(keep=8), VisPruner(keep=0.5, important_ratio=1.0)
    with wide(built) as first:
        built.generate(**req.inputs, **OPTIONS)
    with (wide | narrow)(built) as both:
        built.generate(**req.inputs, **OPTIONS)
    kept = set(both.report.kept[0].tolist())
    assert len(kept) == 4 and kept < set(first.report.kept[0].tolist())
    assert repr(wide | narrow | wide) == f"{wide!r} | {narrow!r} | {wide!r}"
    with pytest.raises(VlmpruneError, match="different positions"):
        VisPruner(4, positions="compact") | VisPruner(2, positions="original")


@pytest.mark.parametrize("budget", ["crop", "image"])
def test_budgets_of_any_resolution_images(budget: Any) -> None:
    built = model("llava_next")
    req = request(built, [2])
    with VisPruner(keep=6, budget=budget)(built) as handle:
        built.generate(**req.inputs, **OPTIONS)
    report = handle.report
    cut = [bool((one.candidates().sum(1) < 16).any()) for one in report.layouts]
    assert any(cut), "no crop of this test has padding cut away"
    for kept, layout in zip(report.kept, report.layouts, strict=True):
        patches = layout.labels[kept] >= 0
        assert int((~patches).sum()) == layout.newlines > 0
        if budget == "image":
            assert int(patches.sum()) == 6
            continue
        crops = layout.crop[kept][patches]
        sizes = layout.candidates().sum(1)
        assert torch.equal(torch.bincount(crops, minlength=layout.crops), sizes.clamp(max=6))
    assert report.newline_tokens == sum(one.newlines for one in report.layouts)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_report_adds_up(family: str) -> None:
    built = model(family)
    req = request(built, [1, 2])
    pruner = VisPruner(keep=4)
    assert pruner.report is None
    with pruner(built) as handle:
        built.generate(**req.inputs, **OPTIONS)
    report = pruner.report
    assert report is handle.report and report is not None
    counts = [len(k) for k in report.kept]
    assert report.visual_tokens_before == sum(req.lengths)
    assert report.visual_tokens_after == sum(counts)
    for kept, length in zip(report.kept, req.lengths, strict=True):
        assert kept.dtype == torch.long and kept.tolist() == sorted(set(kept.tolist()))
        assert int(kept.min()) >= 0 and int(kept.max()) < length
    assert report.kv_bytes_after == costs.kv_bytes(built.config, sum(counts), 4)
    crops = sum(one.crops for one in report.layouts)
    after = [counts[0], sum(counts[1:])]
    assert report.flops_after == costs.encoder_flops(built.config, crops) + sum(
        costs.prefill_flops(built.config, n) for n in after
    )
    for roles, kept, layout in zip(report.roles, report.kept, report.layouts, strict=True):
        named = roles["important"] | roles["diverse"] | (layout.labels < 0)
        assert torch.equal(named.nonzero()[:, 0], kept)
        assert not bool((roles["important"] & roles["diverse"]).any())
    loaded = json.loads(report.json())
    assert loaded["kept"] == [k.tolist() for k in report.kept]
    assert f"{sum(req.lengths)} → {sum(counts)} visual tokens" in str(report)
    assert int(dropped_columns(req, report.kept).sum()) == sum(req.lengths) - sum(counts)


def test_the_config_recommends_positions() -> None:
    built = model()
    assert VisPruner(4).attach(built).positions == "compact"
    built.config.vlmprune = {"positions": "original"}
    assert VisPruner(4).attach(built).positions == "original"
    assert VisPruner(4, positions="compact").attach(built).positions == "compact"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0}, "keep=0 leaves no visual tokens"),
        ({"keep": -3}, "keep=-3"),
        ({"keep": 1.5}, r"keep=1.5 is a fraction outside \(0, 1\]"),
        ({"keep": 0.0}, r"keep=0.0 is a fraction"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"keep": True}, "keep=True is not a number"),
        ({"keep": "64"}, "keep='64' is not a number"),
        ({"keep": 4, "important_ratio": 1.2}, "important_ratio=1.2"),
        ({"keep": 4, "important_ratio": -0.1}, "important_ratio=-0.1"),
        ({"keep": 4, "positions": "keep"}, "positions='keep'"),
        ({"keep": 4, "budget": "video"}, "budget='video'"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(VlmpruneError, match=words) as caught:
        VisPruner(**settings)
    assert "\n" not in str(caught.value) and "use " in str(caught.value)


def test_unsupported_models_are_refused_by_name() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(VlmpruneError, match=r"LlamaForCausalLM.*`vlmprune models`"):
        VisPruner(4).attach(llama)
    built = model()
    with pytest.raises(VlmpruneError, match="LlavaModel"):
        VisPruner(4).attach(built.model)
    with pytest.raises(VlmpruneError, match="str"):
        VisPruner(4).attach("llava")  # type: ignore[arg-type]
    built.config.vision_config.model_type = "ijepa"
    with pytest.raises(VlmpruneError, match=f"the vision tower 'ijepa' yet; .*{'.*'.join(TOWERS)}"):
        VisPruner(4).attach(built)


def test_a_tower_without_cls_needs_full_selection() -> None:
    built = model(kind="siglip")
    req = request(built, [1])
    built.config.vision_feature_select_strategy = "default"
    with VisPruner(4)(built), pytest.raises(VlmpruneError, match="'full'"):
        built.generate(**req.inputs, **OPTIONS)


def test_a_cls_token_that_is_a_visual_token_is_kept() -> None:
    built = model(vision_feature_select_strategy="full")
    req = request(built, [1])
    assert req.lengths == [17]
    with VisPruner(3)(built) as handle:
        built.generate(**req.inputs, **OPTIONS)
    kept = handle.report.kept[0].tolist()
    assert len(kept) == 4 and kept[0] == 0


def test_a_gapped_batch_of_one_is_refused_under_flash_attention() -> None:
    built = model()
    req = request(built, [1])
    built.config.text_config._attn_implementation = "flash_attention_2"
    with VisPruner(4, positions="original")(built), pytest.raises(VlmpruneError, match="packed"):
        built.generate(**req.inputs, **OPTIONS)


def test_what_a_handle_told_before_is_told_with_a_warning() -> None:
    built = model()
    with PLPHP()(built) as handle:
        for former, now in {"cuttable": "cuttable", "inside": "decoder_positions"}.items():
            with pytest.warns(DeprecationWarning, match=f"handle.attachment.{now}"):
                assert getattr(handle, former) is getattr(handle.attachment, now)
        with pytest.raises(AttributeError, match="'Handle' object has no attribute 'hots'"):
            handle.hots  # noqa: B018
        assert len(repr(handle.attachment)) < 200
