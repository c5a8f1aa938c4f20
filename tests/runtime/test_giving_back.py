"""What others put on a model after `attach` stays when the pruner goes, and goes on working."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from answers import same
from vlmprune import VisPruner
from vlmprune.runtime.shadows import Shadows
from zoo import ZOO

pytestmark = pytest.mark.usefixtures("own_state")
FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
OURS = {"generate", "get_image_features", "__getstate__", "_replicate_for_data_parallel"}


@pytest.fixture
def own_state() -> Iterator[None]:
    """Accelerate keeps what a process chose first, of which other tests have their own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build(family: str = "llava") -> tuple[Any, Any, torch.Tensor]:
    model = ZOO[family].build()
    inputs = ZOO[family].request(model, [["image"]]).inputs
    return model, inputs, logits(model, inputs)


def logits(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs).logits


def left_of_ours(model: Any) -> set[str]:
    held = {*vars(model), *vars(model.base_model)}
    return {name for name in held if name in OURS or name.startswith("_get_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_of_ones_own_stays(family: str) -> None:
    model, inputs, whole = build(family)
    handle = VisPruner(keep=2).attach(model)
    ours, seen = model.forward, []

    def forward(**kwargs: Any) -> Any:
        seen.append(kwargs)
        return ours(**kwargs)

    model.forward = forward
    assert logits(model, inputs).shape != whole.shape
    handle.detach()
    assert model.forward is forward
    assert torch.equal(logits(model, inputs), whole)
    assert len(seen) == 2
    # On top of it another is attached, and goes without a trace.
    with VisPruner(keep=2)(model):
        assert logits(model, inputs).shape != whole.shape
        assert len(seen) == 3
    assert model.forward is forward
    assert torch.equal(logits(model, inputs), whole)
    del model.forward
    assert torch.equal(logits(model, inputs), whole)
    assert not left_of_ours(model)


def test_a_second_attachment_acts_above_what_was_put_on_between() -> None:
    """And the one below passes on, instead of pruning what is pruned."""
    model, inputs, whole = build()
    first = VisPruner(keep=5).attach(model)
    ours = model.forward
    model.forward = lambda **kwargs: ours(**kwargs)
    theirs = model.forward
    second = VisPruner(keep=2).attach(model)
    assert logits(model, inputs).shape[1] == whole.shape[1] - 16 + 2
    second.detach()
    assert logits(model, inputs).shape[1] == whole.shape[1] - 16 + 5
    first.detach()
    assert model.forward is theirs
    assert torch.equal(logits(model, inputs), whole)
    assert not left_of_ours(model)


@pytest.mark.parametrize("name", ["forward", "generate"])
def test_a_wrapper_that_takes_our_attributes_along_can_be_attached_to(name: str) -> None:
    model, inputs, whole = build()
    handle = VisPruner(keep=2).attach(model)
    ours = getattr(model, name)

    @functools.wraps(ours)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    setattr(model, name, wrapper)
    handle.detach()
    with VisPruner(keep=2)(model):
        assert logits(model, inputs).shape[1] == whole.shape[1] - 16 + 2
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == whole.shape[1] + 2
    assert vars(model)[name] is wrapper
    assert torch.equal(logits(model, inputs), whole)


def test_a_forward_put_back_over_ours_is_not_stuck() -> None:
    """Someone who keeps what stood there and puts it back later puts back what only passes on."""
    model, inputs, whole = build()
    handle = VisPruner(keep=2).attach(model)
    kept = model.forward
    model.forward = lambda **kwargs: kept(**kwargs)
    handle.detach()
    model.forward = kept
    assert torch.equal(logits(model, inputs), whole)
    with VisPruner(keep=2)(model):
        assert logits(model, inputs).shape != whole.shape
    assert torch.equal(logits(model, inputs), whole)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerates_autocast_stays(family: str) -> None:
    model, inputs, _ = build(family)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    handle = VisPruner(keep=2).attach(model)
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    prepared = accelerator.prepare(model)
    short = logits(prepared, inputs)
    handle.detach()
    whole = logits(prepared, inputs)
    assert short.shape != whole.shape
    assert set(seen) == {torch.bfloat16}
    plain, _, _ = build(family)
    assert torch.equal(logits(accelerator.prepare(plain), inputs), whole)


@pytest.mark.parametrize("order", ["attached first", "prepared first"])
def test_accelerate_unwraps_an_attached_model(order: str) -> None:
    """The fp32 wrapper goes, the pruner acts on, and leaves nothing when it goes."""
    model, inputs, full = build()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    if order == "attached first":
        handle = VisPruner(keep=2).attach(model)
        model = accelerator.prepare(model)
    else:
        model = accelerator.prepare(model)
        handle = VisPruner(keep=2).attach(model)
    assert logits(model, inputs).shape != full.shape
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert bare is model
    short = logits(bare, inputs)
    assert short.shape[1] == full.shape[1] - 16 + 2
    assert seen == [torch.bfloat16, torch.float32]
    handle.detach()
    assert not left_of_ours(model)
    assert logits(bare, inputs).shape == full.shape


def test_accelerate_unwraps_and_keeps_its_wrapper() -> None:
    model, inputs, full = build()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    with VisPruner(keep=2)(model):
        bare = accelerator.unwrap_model(accelerator.prepare(model))
        assert logits(bare, inputs).shape[1] == full.shape[1] - 16 + 2
    assert logits(bare, inputs).shape == full.shape
    assert not same(logits(bare, inputs), full)


def test_a_call_under_way_goes_on_when_its_pruner_goes() -> None:
    """As where a thread that was started inside a block outlives it."""
    model, inputs, _ = build()
    pruner = VisPruner(keep=2)
    with pruner(model):
        due = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    handle = pruner.attach(model)

    def stop(ids: Any, scores: Any) -> torch.Tensor:
        handle.detach()
        return torch.zeros(len(ids), dtype=torch.bool)

    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, stopping_criteria=[stop])
    assert torch.equal(found, due)
    assert not left_of_ours(model)
    assert "forward" not in vars(model)


def test_a_later_attachment_keeps_no_other_model_alive() -> None:
    model, other = build()[0], build()[0]
    handle = VisPruner(keep=2).attach(model)
    later = VisPruner(keep=2).attach(other)
    held = weakref.ref(model)
    del model, handle
    gc.collect()
    assert held() is None
    later.detach()


def test_how_an_instance_is_copied_is_its_own_again() -> None:
    model, _, _ = build()

    def state() -> dict[str, Any]:
        return dict(vars(model))

    vars(model)["__getstate__"] = state
    VisPruner(keep=2).attach(model).detach()
    assert vars(model)["__getstate__"] is state


def test_an_attachment_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither shadows that stood already nor what the method put on the model."""
    model, inputs, whole = build()
    shadow, left = Shadows._shadow, list[str]()

    class Joining(VisPruner):
        def joined(self, attachment: Any) -> Any:
            return lambda: left.append("joined")

    def failing(self: Shadows, name: str, place: Any) -> None:
        if name == "get_image_features":
            raise RuntimeError(name)
        shadow(self, name, place)

    with monkeypatch.context() as patched:
        patched.setattr(Shadows, "_shadow", failing)
        with pytest.raises(RuntimeError, match="get_image_features"):
            Joining(keep=2).attach(model)
    assert left == ["joined"]
    assert not left_of_ours(model)
    assert "forward" not in vars(model)
    assert torch.equal(logits(model, inputs), whole)
    with VisPruner(keep=2)(model):
        assert logits(model, inputs).shape != whole.shape
