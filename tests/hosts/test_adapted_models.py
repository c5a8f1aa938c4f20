"""Models as users have them: adapters, device maps, compiled parts, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import IMAGE, Request, dropped_columns, model, request
from vlmprune import PLPHP, VisPruner, VlmpruneError

# PEFT itself asks newer releases of transformers by a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
STEPS = {"max_new_tokens": 4, "do_sample": False}


def outputs(built: Any, req: Request) -> Tensor:
    """[steps, B, V] logits."""
    out = built.generate(**req.inputs, **STEPS, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def adapted(built: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(built, settings).eval()


@pytest.mark.parametrize("pruner", [VisPruner(keep=5), VisPruner(keep=8) | PLPHP()])
def test_an_adapter_on_the_model(pruner: Any) -> None:
    """The wrapper and the model inside prune alike, and as the adapter merged into the weights."""
    req = request(model(), [1, 2])
    wrapped = adapted(model())
    plain = outputs(wrapped, req)
    with pruner(wrapped) as handle:
        pruned = outputs(wrapped, req)
        assert torch.equal(outputs(wrapped.get_base_model(), req), pruned)
    assert handle.report is not None and handle.report.kept
    assert float((pruned - plain).abs().max()) > 1e-3
    assert torch.equal(outputs(wrapped, req), plain)
    merged = wrapped.merge_and_unload()
    with pruner(merged):
        assert float((outputs(merged, req) - pruned).abs().max()) < 1e-4


@pytest.mark.parametrize("pruner", [VisPruner(keep=5), PLPHP()])
def test_an_adapter_put_on_while_attached(pruner: Any) -> None:
    req = request(model(), [1])
    with pruner(adapted(model())) as handle:
        wanted = outputs(handle.model, req)
    built = model()
    handle = pruner.attach(built)
    assert torch.equal(outputs(adapted(built), req), wanted)
    handle.detach()


@pytest.mark.parametrize("pruner", [VisPruner(keep=5), VisPruner(keep=8) | PLPHP()])
def test_weights_moved_in_and_out_by_a_device_map(pruner: Any, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    built = model()
    req = request(built, [1, 2])
    with pruner(built):
        wanted = outputs(built, req)
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(3)}
    layers["model.language_model.layers.1"] = "disk"
    rest = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    spread = accelerate.dispatch_model(built, layers | rest, offload_dir=str(tmp_path))
    with pruner(spread):
        assert torch.equal(outputs(spread, req), wanted)


def test_gradients_are_those_of_masking() -> None:
    """A plain forward trains: the loss's gradients equal the full model's under a mask."""
    built = model()
    req = request(built, [1, 2])
    ids, mask = req.inputs["input_ids"], req.inputs["attention_mask"]
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    labels[:, : ids.shape[1] - 4] = -100

    def gradients(**inputs: Any) -> dict[str, Tensor]:
        built.zero_grad()
        built(**(req.inputs | inputs)).loss.backward()
        return {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}

    with VisPruner(keep=5, positions="original")(built) as handle:
        ours = gradients(labels=labels)
    assert handle.report is not None
    dropped = dropped_columns(req, handle.report.kept)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    theirs = gradients(labels=labels, attention_mask=mask * ~dropped, position_ids=columns)
    plain = gradients(labels=labels)
    assert ours.keys() == theirs.keys()
    assert any("vision_tower" in name for name in ours)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).abs().max()) < 1e-5 * max(1.0, largest), name
    moved = max(float((ours[n] - plain[n]).abs().max()) for n in ours)
    assert moved > 1e-3 * largest


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("what", ["forward", "language model", "wrapper"])
def test_compiled_parts(what: str) -> None:
    """Choosing before the language model goes with compilation; cutting caches is refused."""
    built = model()
    req = request(built, [1, 2])
    with VisPruner(keep=5)(built):
        wanted = outputs(built, req)
    with PLPHP()(built):
        cut = outputs(built, req)
    if what == "forward":
        built.forward = torch.compile(built.forward, backend="eager", dynamic=True)
    elif what == "wrapper":
        built = torch.compile(built, backend="eager", dynamic=True)
    else:
        inner = built.model.language_model
        inner.forward = torch.compile(inner.forward, backend="eager", dynamic=True)
    with VisPruner(keep=5)(built) as handle:
        assert float((outputs(built, req) - wanted).abs().max()) < 1e-5
    assert handle.report is not None and handle.report.kept
    if what == "wrapper":
        # Its `generate` is the inner model's, which is not compiled.
        with PLPHP()(built):
            assert torch.equal(outputs(built, req), cut)
        return
    with pytest.raises(VlmpruneError, match="compiled"), PLPHP()(built):
        outputs(built, req)
