"""A LoRA that a method was trained with, against PEFT's own layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from vlmprune.learned import Lora

from learned_host import fresh, hooks, host, logits
from tiny import model, request
from vlmprune import QueCC, VisPruner, VlmpruneError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# The flag's name differs between releases.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(LlavaForConditionalGeneration, name)
)


def tuned(seed: int = 3, **more: Any) -> tuple[Any, Any]:
    """A host, and PEFT's wrapping of it with a LoRA that does something."""
    peft = pytest.importorskip("peft")
    built = model()
    layers = {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **(layers | more))
    wrapped = peft.get_peft_model(built, config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return built, wrapped.eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_pefts_own_layers(tmp_path: Path, rslora: bool) -> None:
    built, wrapped = tuned(use_rslora=rslora)
    clean = model()
    pruner, req = fresh(clean), request(clean, [1, 2], text=[3, 6])
    plain = logits(clean, pruner, req.inputs)
    # PEFT's layers are in the host: prompt and question pass them.
    want = logits(built, pruner, req.inputs)
    pruner.take_lora(wrapped)
    pruner.save_pretrained(tmp_path)
    again = QueCC(str(tmp_path))
    assert again.trained.lora is not None
    found = logits(clean, again, req.inputs)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2
    before = hooks(clean)
    with again(clean) as handle:
        kept = torch.no_grad()(lambda: clean.generate(**req.inputs, max_new_tokens=4))()
        assert hooks(clean) - before == len(again.trained.lora.targets) == 9
        # A call without an image is the host's own.
        text = {"input_ids": torch.tensor([[1, 20, 21, 22]])}
        with torch.no_grad():
            alone = clean(**text).logits
        # So is one of a later attachment, which acts alone.
        with VisPruner(keep=4)(clean), torch.no_grad():
            later = clean(**req.inputs).logits
    assert handle.report is not None
    with torch.no_grad():
        assert torch.equal(alone, clean(**text).logits)
        with VisPruner(keep=4)(clean):
            assert torch.equal(later, clean(**req.inputs).logits)
    with fresh(built)(built), torch.no_grad():
        assert torch.equal(kept, built.generate(**req.inputs, max_new_tokens=4))
    assert hooks(clean) == before
    assert torch.equal(logits(clean, fresh(clean), req.inputs), plain)


def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, wrapped = tuned()
    pruner = fresh(host())
    pruner.take_lora(wrapped)
    lora = pruner.trained.lora
    assert lora is not None
    name = next(iter(lora.tensors))
    lora.tensors[name.replace("q_proj", "other_proj")] = lora.tensors[name]
    other = name.replace("lora_A", "lora_B")
    lora.tensors[other.replace("q_proj", "other_proj")] = lora.tensors[other]
    with pytest.raises(VlmpruneError, match=r"is for a linear layer .*other_proj' of 32 to"):
        pruner.attach(host())
    assert hooks(host()) == hooks(model())
    wrapped.peft_config["default"].bias = "all"
    with pytest.raises(VlmpruneError, match="bias='all', which a hook cannot do"):
        Lora.of_peft(wrapped)
    _, words = tuned(target_modules=["embed_tokens"])
    with pytest.raises(VlmpruneError, match=r"lora_embedding_A.*is no A or B of a linear layer"):
        Lora.of_peft(words)
    pruner.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"lora": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VlmpruneError, match="disagree about a LoRA"):
        QueCC(str(tmp_path)).attach(host())


def test_a_chain_puts_it_on_too() -> None:
    _, wrapped = tuned()
    clean = model()
    pruner, req = fresh(clean), request(clean, [1])
    without = logits(clean, pruner | VisPruner(keep=3), req.inputs)
    pruner.take_lora(wrapped)
    assert (logits(clean, pruner | VisPruner(keep=3), req.inputs) - without).abs().max() > 1e-2
    assert hooks(clean) == hooks(model())


def test_recomputed_activations_are_refused() -> None:
    _, wrapped = tuned()
    built = model()
    pruner = fresh(built)
    pruner.take_lora(wrapped)
    getattr(built, CHECKPOINTING)()
    built.train()
    said = (
        "by hooks is not there when activations are recomputed; train it by PEFT, or turn gradient"
    )
    with pruner(built), pytest.raises(VlmpruneError, match=said):
        built(**request(built, [1]).inputs)
