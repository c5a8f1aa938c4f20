"""The code on the documentation pages runs, and does what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from answers import DIFFERENT, TOLERANCE, distance, generate
from repository import ROOT
from stock import cache_of
from tiny import IMAGE, dropped_columns, model, positions_of, request
from vlmprune import VisPruner
from vlmprune.hosts.contract import ContractError
from vlmprune.hosts.families import FAMILIES, register
from vlmprune.methods import METHODS
from zoo.base import loud, unusual_scales

DOCS = ROOT / "docs"


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


def test_add_a_method_that_drops_rows() -> None:
    """A padded batch: of each image the share that all text before and behind it attends to."""
    space: dict[str, Any] = {"__name__": "example"}
    page = "add-a-method.md"
    exec(compile(code(page), page, "exec", dont_inherit=True), space)
    built = model(attention="eager")
    req = request(built, [1, 2], text=[4, 7])
    with space["ReadByText"](share=0.25, layer=1)(built) as handle:
        built.generate(**req.inputs, max_new_tokens=2)
    assert [layer.index for layer in handle.report.layers] == [1, 2]
    with torch.no_grad():
        attention = built(**req.inputs, output_attentions=True).attentions[1]
    ids, found = req.inputs["input_ids"], []
    for sample, mask, rows in zip(ids, req.inputs["attention_mask"], attention, strict=True):
        visual = (sample == IMAGE).nonzero()[:, 0]
        text = ((sample != IMAGE) & mask.bool()).nonzero()[:, 0]
        paid = rows[:, text][:, :, visual].sum(dim=(0, 1))
        found += [sorted(part.topk(4).indices.tolist()) for part in paid.split(16)]
    assert [kept.tolist() for kept in handle.report.kept] == found
    assert len(found) == 3


def test_add_a_method_that_skips_layers() -> None:
    """Every other visual token is in the caches of layers 0 and 2 alone, and comes back."""
    space: dict[str, Any] = {"__name__": "example"}
    page = "add-a-method.md"
    exec(compile(code(page), page, "exec", dont_inherit=True), space)
    built = model()
    req = request(built, [2])
    with torch.no_grad(), space["EveryOther"]()(built) as handle:
        cache = cache_of(built(**req.inputs))
    words = req.inputs["input_ids"].shape[1] - 32
    assert [layer.keys.shape[2] - words for layer in cache.layers] == [32, 16, 32]
    assert [kept.tolist() for kept in handle.report.layers[1].kept] == [[*range(1, 16, 2)]] * 2
    assert handle.report.visual_tokens_after == 32


def test_a_record_from_outside(own_records: None) -> None:
    """The page's class is pruned as masking has it, and with LLaVA's own record refused."""
    space: dict[str, Any] = {"__name__": "example"}
    page = "add-a-family.md"
    exec(compile(code(page), page, "exec", dont_inherit=True), space)
    assert space["handle"].report.visual_tokens_after == 4
    built = unusual_scales(loud(space["model"]))
    req = request(model(), [1, 2], text=[4, 7])
    with VisPruner(keep=5)(built) as handle:
        pruned = generate(built, req.inputs)
    kept, mask = handle.report.kept, req.inputs["attention_mask"]
    for columns, equal in ((kept, True), ([(one + 1) % 16 for one in kept], False)):
        dropped = dropped_columns(req, columns)
        positions = positions_of(mask, dropped, "compact")
        told = {"attention_mask": mask * ~dropped, "position_ids": positions}
        far = distance(pruned, generate(built, req.inputs | told))
        assert far < TOLERANCE if equal else far > DIFFERENT
    register("columns", FAMILIES["llava"], replace=True)
    with (
        pytest.raises(ContractError, match="not made of the patches"),
        VisPruner(keep=5)(built),
    ):
        generate(built, req.inputs)


def test_the_table_of_methods() -> None:
    """It holds every method, in their order, as the classes say."""
    text = (DOCS / "methods.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    expected = []
    for name, cls in METHODS.items():
        number = cls.paper.removeprefix("arXiv ")
        link = f"[{cls.paper}](https://arxiv.org/abs/{number})"
        paper = link if cls.paper.startswith("arXiv ") else cls.paper
        sees = "no" if cls.text_agnostic else "yes"
        expected.append(
            [f"`{cls.__name__}`", f"`{name}`", cls.stage, cls.training, sees, cls.needs, paper]
        )
    assert [row for row in rows if len(row) == 7] == expected
