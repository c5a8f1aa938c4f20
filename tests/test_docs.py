"""The code on the documentation pages runs, and does what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tiny import IMAGE, model, request

DOCS = Path(__file__).parents[1] / "docs"


def code(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks, f"{page} shows no code"
    return "\n".join(blocks)


def test_add_a_method(tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "example"}
    page = "add-a-method.md"
    exec(compile(code(page), page, "exec", dont_inherit=True), space)
    built = model("llava_next")
    req = request(built, [1])
    seen: list[torch.Tensor] = []
    hook = built.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with space["LargestFeatures"](keep=3)(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    hook.remove()
    layout = handle.report.layouts[0]
    norms = seen[0].norm(dim=-1).masked_fill(~layout.candidates(), 0)
    expected = {16 * crop + int(i) for crop, row in enumerate(norms) for i in row.topk(3).indices}
    labels = layout.labels[handle.report.kept[0]]
    assert set(labels[labels >= 0].tolist()) == expected


def test_add_a_method_that_cuts_the_cache() -> None:
    space: dict[str, Any] = {"__name__": "example"}
    page = "add-a-method.md"
    exec(compile(code(page), page, "exec", dont_inherit=True), space)
    built = model(attention="eager")
    req = request(built, [2])
    with space["MostAttended"](share=0.25)(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    with torch.no_grad():
        full = built(**req.inputs, output_attentions=True).attentions
    visual = (req.inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    for layer, attention in zip(handle.report.layers, full, strict=True):
        scores = attention[0, :, -1, visual].unflatten(0, (2, 2)).mean(1)
        for head, (kept,) in enumerate(layer.kept):
            best = [half.topk(4).indices.sort().values for half in scores[head].split(16)]
            assert kept.tolist() == torch.cat((best[0], best[1] + 16)).tolist()
