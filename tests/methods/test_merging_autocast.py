"""Methods that merge visual tokens under autocast: in training and answers, alone and chained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmprune import (
    AveragePooling,
    Downsample,
    EViT,
    FastV,
    MoD,
    PruMerge,
    QueCC,
    SparseVLM,
    ToMe,
    VisionZip,
    VisPruner,
    VisToG,
)
from zoo import ZOO

MERGING: dict[str, Any] = {
    "visionzip": lambda _: VisionZip(keep=6, contextual_ratio=0.5),
    "prumerge": lambda _: PruMerge(keep=6),
    "prumerge, its own number": lambda _: PruMerge(),
    "tome": lambda _: ToMe(keep=6),
    "evit": lambda _: EViT(keep=6),
    "evit and vispruner": lambda _: EViT(keep=8) | VisPruner(keep=4),
    "average pooling": lambda _: AveragePooling(keep=4),
    "average pooling, projected": lambda _: AveragePooling(keep=4, where="projected"),
    "downsample": lambda _: Downsample(keep=4),
    "sparsevlm": lambda _: SparseVLM(keep=4),
    "visionzip and vispruner": lambda _: (
        VisionZip(keep=8, contextual_ratio=0.5) | VisPruner(keep=4)
    ),
    "visionzip and fastv": lambda _: (
        VisionZip(keep=8, contextual_ratio=0.5) | FastV(keep=4, layer=1)
    ),
    "quecc": lambda built: QueCC.fresh(built, window=2),
    "vistog": lambda built: VisToG.fresh(built, tokens=4),
    "mod": lambda built: MoD.fresh(built, keep=4),
}

# What leaves under these is in no kept token of the language model.
UNMERGED = ("mod", "evit", "evit and vispruner")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MERGING)
def test_a_step_of_training_and_an_answer(name: str, kind: torch.dtype) -> None:
    built = ZOO["llava"].build()
    inputs = ZOO["llava"].request(built, [["image"], ["image", "image"]], text=[5, 8]).inputs
    ids = inputs["input_ids"]
    # The answer's last words alone, for some methods look at the question.
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    pruner, loss = MERGING[name](built), {}
    for enabled in (False, True):
        built.zero_grad()
        with torch.autocast("cpu", kind, enabled=enabled), pruner(built) as handle:
            out = built(**inputs, labels=labels)
            assert out.logits.dtype == (kind if enabled else torch.float32)
            answer = built.generate(**inputs, max_new_tokens=2, do_sample=False)
            members = handle.report.members
        out.loss.backward()
        assert answer.shape[1] == ids.shape[1] + 2
        if name not in UNMERGED:
            # Some tokens went into others.
            assert any(bool((into != torch.arange(len(into))).any()) for into in members)
        grad = built.model.multi_modal_projector.linear_2.weight.grad
        if name not in ("quecc", "vistog"):
            # Those have a projector of their own.
            assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0
        loss[enabled] = float(out.loss.detach())
    assert abs(loss[True] - loss[False]) < 0.3
