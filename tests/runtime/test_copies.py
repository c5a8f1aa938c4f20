"""A copy of an attached model, made in whatever way, is a model of its own that nobody prunes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from answers import same
from vlmprune import PLPHP, FastV, VisPruner
from zoo import ZOO

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
SHADOWED = ("forward", "generate", "get_image_features", "__getstate__")


def logits(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs).logits


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model).module,
    "pickled": pickled,
    "saved": saved,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_clean_and_runs_its_own_weights(family: str, way: str) -> None:
    # Of a model that has run Transformers leaves what cannot be pickled, attached or not.
    model, twin = ZOO[family].build(), ZOO[family].build()
    inputs = ZOO[family].request(twin, [["image"]]).inputs
    whole = logits(twin, inputs)
    with VisPruner(keep=2)(model):
        other = COPIES[way](model)
        assert same(logits(other, inputs), whole)
        assert logits(model, inputs).shape != whole.shape
        for place in (other, other.base_model):
            assert not vars(place).keys() & {*SHADOWED}
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(0.5)
        changed = logits(other, inputs)
        assert not torch.allclose(changed, whole)
        assert not same(logits(model, inputs), changed)
    assert same(logits(other, inputs), changed)
    assert same(logits(model, inputs), whole)
    # It can be attached to, and nothing of that reaches the original.
    with VisPruner(keep=2)(other) as handle:
        assert logits(other, inputs).shape != whole.shape
        assert handle.report.kept
        assert same(logits(model, inputs), whole)
    assert same(logits(other, inputs), changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_go_to_the_copy(family: str) -> None:
    model = ZOO[family].build()
    inputs = ZOO[family].request(model, [["image"]]).inputs
    with VisPruner(keep=2)(model):
        other = copy.deepcopy(model)
        other(**inputs).logits.sum().backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert any(weight.grad is not None for weight in other.parameters())


def test_what_others_wrapped_is_copied_as_theirs_and_runs_the_copy() -> None:
    """A wrapper that calls ours is the copy's own, and passes the pruner of the original by."""
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    whole = logits(model, inputs)
    with VisPruner(keep=2)(model):
        inner = model.forward.__func__

        def forward(self: Any, **kwargs: Any) -> Any:
            return inner(self, **kwargs)

        model.forward = forward.__get__(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(0.5)
        assert logits(other, inputs).shape == whole.shape
        assert not torch.allclose(logits(other, inputs), whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dynamically_quantized_copy_runs_its_own_layers() -> None:
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    whole = logits(model, inputs)
    with VisPruner(keep=2)(model):
        other = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        rounded = logits(other, inputs)
        assert rounded.shape == whole.shape
        assert not torch.equal(rounded, whole)


def test_a_replica_is_clean_and_says_so() -> None:
    model = ZOO["llava"].build()
    with VisPruner(keep=2)(model):
        with pytest.warns(UserWarning, match="keeps every visual token"):
            replica = model._replicate_for_data_parallel()
        assert not vars(replica).keys() & {*SHADOWED}
        assert replica.forward.__self__ is replica
        assert "forward" in vars(model)


def test_a_copy_made_within_a_chain_that_cuts_caches_goes_on() -> None:
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    options = {"max_new_tokens": 4, "do_sample": False}
    whole = model.generate(**inputs, **options)
    with (VisPruner(keep=4) | PLPHP(r=0.4))(model):
        other = copy.deepcopy(model)
        model.generate(**inputs, **options)
        assert torch.equal(other.generate(**inputs, **options), whole)
    assert torch.equal(other.generate(**inputs, **options), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_that_nobody_holds_is_freed(family: str) -> None:
    model = ZOO[family].build()
    inputs = ZOO[family].request(model, [["image"]]).inputs
    handle = VisPruner(keep=2).attach(model)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("pruner", [FastV(keep=2, layer=1), VisPruner(keep=2)], ids=repr)
def test_a_copy_made_while_a_call_runs_is_clean_too(pruner: Any) -> None:
    """What hangs on layers for the call goes along with a copy, and does nothing there."""
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    whole, made = logits(model, inputs), list[Any]()
    layer = model.model.language_model.layers[1].mlp
    with pruner(model):
        due = logits(model, inputs)
        hook = layer.register_forward_hook(lambda *_: made.append(copy.deepcopy(model)))
        assert same(logits(model, inputs), due)
        hook.remove()
    made[0].model.language_model.layers[1].mlp._forward_hooks.clear()
    assert same(logits(made[0], inputs), whole)
