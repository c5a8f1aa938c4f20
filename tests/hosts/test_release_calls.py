"""Calls whose outcome hangs on what a release of Transformers does: right on each, or refused."""

from __future__ import annotations

import warnings
from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from stock import CACHE, cache_of, repeated_alike, repeats_rows
from tiny import model, request
from vlmprune import PLPHP, FastV, VisPruner, VlmpruneError
from vlmprune.hosts import release
from vlmprune.hosts.decoder import decoder_layers, recomputes
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from zoo import ZOO
from zoo.mended import forwards

pytestmark = pytest.mark.oracle

LATER = CACHE == "cache"
OTHER = "past_key_values" if LATER else "cache"
HERE = Version(transformers.__version__)


@pytest.mark.parametrize("name", ZOO)
def test_arguments_reach_the_host_whatever_it_calls_the_rest(name: str) -> None:
    """Some classes of early releases have **lm_kwargs, in which all that is not named was lost."""
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"]])
    with torch.no_grad(), VisPruner(keep=0.5)(built):
        told = built(**req.inputs, output_hidden_states=True)
        assert "hidden_states" in told and "hidden_states" not in built(**req.inputs)
    kept = req.inputs["input_ids"].shape[1] - told.hidden_states[0].shape[1]
    assert len(told.hidden_states) == len(decoder_layers(built)) + 1 and kept > 0


@pytest.mark.parametrize("pruner", [VisPruner(keep=6, positions="original"), PLPHP(r=0.5)])
def test_the_other_name_works_as_the_release_has_it(pruner: Any) -> None:
    """Accepted with the release's own warning, or refused; never taken for no cache."""
    built = model()
    first = request(built, [1])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    more = torch.randint(6, 60, (1, 4))

    def turns(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        cache = DynamicCache(config=built.config)
        with pruner(built), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            whole = built.generate(**first.inputs, **{name: cache}, **options)
            ids = torch.cat((whole, more), dim=1)
            again = built.generate(input_ids=ids, **{name: cache}, **options)
            held = torch.cat((again, more[:, :1]), dim=1)
            step = built(input_ids=held[:, cache_length(whole, again) :], **{name: cache}).logits
        told = any("is deprecated" in str(one.message) for one in said)
        assert told == (name != CACHE)
        return again, step

    def cache_length(whole: torch.Tensor, again: torch.Tensor) -> int:
        return again.shape[1] - 1

    expected = turns(CACHE)
    if LATER:
        assert all(map(torch.equal, turns(OTHER), expected))
    else:
        with pytest.raises(VlmpruneError, match=r"^cache is called past_key_values"):
            turns(OTHER)
    # The control: without its cache the turn goes otherwise.
    with pruner(built), torch.no_grad():
        alone = built(input_ids=more[:, :1]).logits
    assert (alone - expected[1][:, -1:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_tuples_are_continued_like_outputs(name: str) -> None:
    """`return_dict=False` hands the cache out by place."""
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"]])
    token = torch.tensor([[70]])
    with torch.no_grad():
        plain = built(**req.inputs, return_dict=False)
    with VisPruner(keep=0.5)(built), torch.no_grad():
        output = built(**req.inputs)
        parts = built(**req.inputs, return_dict=False)
        assert torch.equal(parts[0], output.logits)
        # A cache that holds less than was seen watches who goes on with it, in a class of its own.
        names = [[type(one).__name__ for one in each] for each in (parts, plain)]
        assert names[0] == names[1]
        cache = next((one for one in parts if isinstance(one, DynamicCache)), None)
        if cache is None:
            # Early releases leave the cache of some classes out of their tuples.
            assert Version("5.18") > HERE and not any(
                isinstance(one, DynamicCache) for one in plain
            )
            return
        step = built(input_ids=token, **{CACHE: cache}).logits
        assert torch.equal(step, built(input_ids=token, **{CACHE: cache_of(output)}).logits)
    assert release.cache_returned(parts) is cache
    assert release.cache_returned(output) is cache_of(output)
    assert release.cache_returned((1, None)) is release.cache_returned(output.logits) is None


@pytest.mark.parametrize("grad", [False, True])
def test_recomputing_layers_have_a_cache_only_where_the_host_says(grad: bool) -> None:
    """Some releases keep the cache where nothing is recomputed, for want of gradients."""
    built = model().train()
    inputs = request(built, [1]).inputs
    # Renamed, with a warning.
    newer = hasattr(built, "activation_checkpointing_enable")
    getattr(built, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
    with torch.set_grad_enabled(grad):
        assert recomputes(built) == (cache_of(built(**inputs)) is None)
        with PLPHP(r=0.3)(built) as handle:
            cache = cache_of(built(**inputs))
            # Where there is a cache it was cut; where there is none, nothing says so.
            kinds = [isinstance(one, RaggedLayer) for one in getattr(cache, "layers", ())]
            assert all(kinds) and bool(kinds) == bool(handle.report.layers)
        assert bool(kinds) != recomputes(built)
        hooked = release.recomputes_hooks()
        if recomputes(built) and hooked:
            with FastV(keep=4)(built), pytest.raises(VlmpruneError, match="layers that run twice"):
                built(**inputs)
        # `generate` wants no gradients, whatever the caller does.
        with torch.no_grad():
            refused = recomputes(built)
        with FastV(keep=4)(built):
            if refused:
                # Where hooks are left alone the cache is not: the host answers by itself without.
                why = "layers that run twice" if hooked else "its cache holds 0 columns"
                with pytest.raises(VlmpruneError, match=why):
                    built.generate(**inputs, max_new_tokens=2)
            else:
                answer = built.generate(**inputs, max_new_tokens=2, do_sample=False)
                built.eval()
                assert torch.equal(
                    built.generate(**inputs, max_new_tokens=2, do_sample=False), answer
                )
    assert recomputes(built.eval()) is False


def test_a_tower_that_recomputes_leaves_the_cache_alone() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    built.train()
    for module in built.model.vision_tower.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda call, *args: call(*args)
    assert cache_of(built(**inputs)) is not None
    with PLPHP(r=0.3)(built) as handle:
        cache = cache_of(built(**inputs))
    assert all(isinstance(one, RaggedLayer) for one in cache.layers) and handle.report.layers


def test_states_that_only_the_language_models_config_asks_for() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    built.config.text_config.output_hidden_states = True
    with torch.no_grad():
        plain = [len(one[0]) for one in built(**inputs).hidden_states]
        with FastV(keep=4)(built):
            pruned = [len(one[0]) for one in built(**inputs).hidden_states]
    assert plain == pruned and len(plain) == len(decoder_layers(built)) + 1


def test_stored_images_may_be_read_in_chunks() -> None:
    """A host cuts what was encoded ahead into pieces, field by field."""
    entry = ZOO["qwen3_vl"]
    built = entry.build()
    req = entry.request(built, [["image", "image"]])
    options: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True}
    options |= {"output_logits": True, "do_sample": False}
    given = {k: v for k, v in req.inputs.items() if k != "pixel_values"}
    with VisPruner(keep=0.5)(built) as handle:
        expected = built.generate(**req.inputs, **options)
        vision = handle.encode(**req.inputs)
        for more in ({}, {"prefill_chunk_size": 5}):
            if more and not release.chunks_hold_images():
                continue
            got = built.generate(**given, **options, **more, vision=vision)
            for one, other in zip(got.logits, expected.logits, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "llama4"])
def test_encoder_outputs_hold_what_the_hosts_do(name: str) -> None:
    """From 5.24 on a forward hands out what its encoder made."""
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"]])
    with torch.no_grad():
        plain = built(**req.inputs)
        with VisPruner(keep=0.5)(built) as handle:
            pruned = built(**req.inputs)
    assert ("image_outputs" in plain) == ("image_outputs" in pruned) == (Version("5.24") <= HERE)
    if "image_outputs" not in plain:
        return
    mine, theirs = pruned.image_outputs, plain.image_outputs
    # In order, for tuples are made of them.
    assert list(mine) == list(theirs)
    torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state)
    kept, whole = (
        torch.cat([part.flatten(0, -2) for part in one.pooler_output]) for one in (mine, theirs)
    )
    starts = accumulate((len(one.labels) for one in handle.report.layouts), initial=0)
    numbers = torch.cat([k + start for k, start in zip(handle.report.kept, starts, strict=False)])
    assert torch.equal(kept, whole[numbers]) and len(kept) < len(whole)


@pytest.mark.parametrize("name", [name for name in ZOO if "video" in ZOO[name].modalities])
def test_encoder_outputs_of_videos_too(name: str) -> None:
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["video", "image"]])
    if not forwards(req.inputs):
        pytest.skip("this release's own forward of Gemma 4 loses how many frames videos have")
    with torch.no_grad():
        plain = built(**req.inputs)
        with VisPruner(keep=0.5)(built):
            pruned = built(**req.inputs)
    for field in (f"{kind}_outputs" for kind in set(req.modalities)):
        # Gemma 4 hands out what it made of images alone.
        handed = field == "image_outputs" or not name.startswith("gemma4")
        assert (field in plain) == (field in pruned) == (handed and Version("5.24") <= HERE)
        if field in plain:
            mine, theirs = pruned[field], plain[field]
            assert list(mine) == list(theirs)
            torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state)
            held, whole = (
                sum(part.numel() for part in one.pooler_output) for one in (mine, theirs)
            )
            assert 0 < held < whole


def test_chunks_hold_images_where_we_say_so() -> None:
    """Of the stock model: early releases read a prompt in chunks without its images."""
    built = model()
    inputs = request(built, [2, 1]).inputs
    options: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True}
    options |= {"output_logits": True, "do_sample": False}
    whole = built.generate(**inputs, **options)
    chunks = built.generate(**inputs, **options, prefill_chunk_size=16)
    same = all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(whole.logits, chunks.logits, strict=True)
    )
    assert same == release.chunks_hold_images()
    if not same:
        with (
            VisPruner(keep=4)(built),
            pytest.raises(VlmpruneError, match="transformers loses images"),
        ):
            built.generate(**inputs, **options, prefill_chunk_size=16)


@pytest.mark.parametrize("name", ZOO)
def test_repeated_rows_have_their_own_images(name: str) -> None:
    """Where they are pruned they are right even on releases that mix them up by themselves."""
    entry = ZOO[name]
    built = entry.build()
    for kind in entry.modalities:
        inputs = entry.request(built, [[kind, kind], [kind]]).inputs
        with VisPruner(keep=0.5)(built):
            assert repeated_alike(built, inputs)
        # GLM-V's class repeats each image by itself, and is left without videos.
        if Version("5.20") <= HERE and name != "llama4" and not entry.one_placeholder:
            assert repeats_rows(built, inputs)
