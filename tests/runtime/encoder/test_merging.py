"""Merge plans applied: what kept tokens are made of, their order, the report, stored visions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tiny import IMAGE, model, request
from vlmprune import Vision, VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder import merging as library
from vlmprune.views import EncoderView, LayerView, Merge, Retention, Selection
from vlmprune.views.layout import Layout
from zoo import ZOO

FAMILIES = ["llava", "llava_next"]


@dataclass(frozen=True)
class Every(Budgeted):
    """Keeps every `step`-th candidate of a crop, made of itself and the ones up to the next."""

    keep: int | float = 1.0
    step: int = 4
    projected: bool = False
    last: bool = False
    merging: bool = True
    views: list[EncoderView] = field(default_factory=list, repr=False)

    text_agnostic: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def select(self, view: EncoderView) -> Selection:
        self.views.append(view)
        kept = torch.zeros_like(view.candidates)
        members = torch.full(kept.shape, -1)
        last = torch.zeros_like(kept)
        into, source, weight = [], [], []
        wide = kept.shape[1]
        for crop, row in enumerate(view.candidates):
            cells = [crop * wide + i for i in row.nonzero()[:, 0].tolist()]
            for n, start in enumerate(range(0, len(cells), self.step)):
                group = cells[start : start + self.step]
                kept.view(-1)[group[0]] = True
                last.view(-1)[group[0]] = n % 2 == 0
                for place, cell in enumerate(group):
                    # What a cell pays does not add up to one; PruMerge's does not either.
                    into.append(group[0])
                    source.append(cell)
                    weight.append(1.0 / (place + 1))
                    members.view(-1)[cell] = group[0]
        merge = Merge(torch.tensor(into), torch.tensor(source), torch.tensor(weight))
        return Selection(
            kept,
            {"important": kept},
            replace(merge, projected=self.projected) if self.merging else None,
            members if self.merging else None,
            last if self.last else None,
        )


def run(built: Any, pruner: Any, inputs: dict[str, Any]) -> tuple[Any, list[Tensor], Any]:
    """Logits, what the language model got for visual tokens, and the report."""
    given_: list[Tensor] = []
    hook = built.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given_.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), pruner(built) as handle:
        logits = built(**inputs).logits
    hook.remove()
    assert handle.report is not None
    return logits, given_, handle.report


def tokens_of(built: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """For each image its visual tokens, and the same packing of features before the projector.

    The second goes through the host with the projector taken out, so that newlines show.
    """
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    projector = built.model.multi_modal_projector
    with torch.no_grad():
        projected = list(built.get_image_features(**pixels).pooler_output)
        hook = projector.register_forward_hook(lambda _, args, __: args[0])
        raw = list(built.get_image_features(**pixels).pooler_output)
        hook.remove()
    return projected, raw


def newlines(built: Any, tokens: Tensor) -> list[int]:
    newline = getattr(built.model, "image_newline", None)
    if newline is None:
        return []
    return (tokens == newline).all(dim=1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tokens_are_projected_sums(family: str, projected: bool) -> None:
    """Each kept token, by hand, out of tokens that the host itself packs."""
    built = model(family)
    req = request(built, [2, 0, 1])
    pruner = Every(projected=projected)
    _, (seen,), report = run(built, pruner, req.inputs)
    after, before = tokens_of(built, req.inputs)
    project = built.model.multi_modal_projector

    flat = []
    for image, (kept, members) in enumerate(zip(report.kept, report.members, strict=True)):
        ends = newlines(built, after[image])
        for token in kept.tolist():
            group = [t for t, into in enumerate(members.tolist()) if into == token]
            if token in ends:
                assert group == [token]
                flat.append(after[image][token])
                continue
            labels = report.layouts[image].labels.tolist()
            # The cells of a group in the order of the crop, which packing may have taken apart.
            group.sort(key=lambda t: labels[t])
            assert group[0] == token and 1 <= len(group) <= 4
            weights = [1.0 / (place + 1) for place in range(len(group))]
            source = after[image] if projected else before[image]
            total = sum(w * source[t] for w, t in zip(weights, group, strict=True))
            assert isinstance(total, Tensor)
            with torch.no_grad():
                flat.append(total if projected else project(total))
            # Control: it is not the token that stood there.
            if len(group) > 1:
                assert (flat[-1] - after[image][token]).abs().max() > 1e-3
    assert sum(len(g) for g in report.kept) == len(flat)
    # The prompts' visual columns, row by row.
    ids = req.inputs["input_ids"]
    counts = [len(k) for k in report.kept]
    dropped = [n - c for n, c in zip(req.lengths, counts, strict=True)]
    assert sum(dropped) > 0 and ids.shape[1] > seen.shape[1]
    rows = _visual_rows(seen, req, report)
    torch.testing.assert_close(rows, torch.stack(flat), rtol=0, atol=1e-5)
    if not projected:
        other = run(built, Every(projected=True), req.inputs)[1][0]
        assert (other - seen).abs().max() > 1e-3, "a projector is not linear"


def _visual_rows(seen: Tensor, req: Any, report: Any) -> Tensor:
    """Embeddings of kept visual tokens, by columns that are worked out here."""
    left = [len(k) for k in report.kept]
    out, image, lengths = [], 0, list(req.lengths)
    for row, ids in enumerate(req.inputs["input_ids"].tolist()):
        short: list[bool] = []
        column = 0
        while column < len(ids):
            if ids[column] == IMAGE:
                short += [True] * left[image]
                column += lengths[image]
                image += 1
            else:
                if req.inputs["attention_mask"][row, column]:
                    short.append(False)
                column += 1
        padded = [False] * (seen.shape[1] - len(short)) + short
        out.append(seen[row][torch.tensor(padded)])
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_ones_come_behind(family: str) -> None:
    """Of LLaVA-NeXT behind the crops that the image is cut into, as VisionZip's release does."""
    built = model(family)
    req = request(built, [1, 1])
    with_ = run(built, Every(last=True, positions="compact"), req.inputs)
    without = run(built, Every(positions="compact"), req.inputs)
    report = with_[2]
    assert [k.tolist() for k in report.kept] == [k.tolist() for k in without[2].kept]
    assert all(torch.equal(k, k.sort().values) for k in report.kept), "ascending all the same"
    moved, plain = (_visual_rows(one[1][0], req, report) for one in (with_, without))
    want, start = [], 0
    for kept, layout in zip(report.kept, report.layouts, strict=True):
        labels = [int(layout.labels[t]) for t in kept]
        assert layout.crops == 1 or -1 in labels
        behind: list[list[int]] = []
        for crop in range(layout.crops):
            own = [i for i, label in enumerate(labels) if label >= 0 and label // 16 == crop]
            # Every second one of a crop's kept cells is asked to come last, beginning with the
            # first, counted by cell.
            behind.append(sorted(own, key=lambda i: labels[i])[::2])
        # The view of the whole image is crop 0, and comes first; newlines are among the others.
        moved_away = {i for ones in behind for i in ones}
        ahead = [i for i in range(len(labels)) if i not in moved_away]
        whole = [i for i in ahead if 0 <= labels[i] < 16]
        others = [i for i in ahead if i not in whole]
        order = [*whole, *behind[0], *others, *(i for ones in behind[1:] for i in ones)]
        assert sorted(order) == list(range(len(kept)))
        want += [start + i for i in order]
        start += len(kept)
    assert want != sorted(want)
    torch.testing.assert_close(moved, plain[want], rtol=0, atol=0)
    # With positions that keep gaps, a token stays where it was.
    gaps = [run(built, Every(last=last, positions="original"), req.inputs) for last in (0, 1)]  # type: ignore[arg-type]
    assert torch.equal(gaps[0][0], gaps[1][0])


def test_last_ones_by_where_the_whole_view_stands() -> None:
    """Three crops of two cells, a newline behind each; the second cell of each goes behind."""
    labels = torch.tensor([0, 1, -1, 2, 3, -1, 4, 5, -1])
    every = torch.ones(9, dtype=torch.bool)
    last = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1, 0]).bool()
    for whole, want in (
        (None, [0, 2, 1, 3, 5, 4, 6, 8, 7]),
        (0, [0, 2, 1, 3, 5, 6, 8, 4, 7]),
        (2, [0, 2, 3, 5, 1, 4, 6, 8, 7]),
    ):
        layout = Layout(labels, 3, (1, 2), whole_crop=whole)
        assert library.order(layout, every, last).tolist() == want
    # Of those that are left, without the first of the second crop.
    kept = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
    layout = Layout(labels, 3, (1, 2), whole_crop=0)
    assert library.order(layout, kept, last).tolist() == [0, 2, 1, 4, 5, 7, 3, 6]


def test_gradients_reach_all_members() -> None:
    built = model()
    req = request(built, [1])
    for projected in (False, True):
        built.zero_grad()
        with Every(projected=projected)(built):
            built(**req.inputs).logits.float().square().mean().backward()
        first = built.model.vision_tower.embeddings.patch_embedding.weight
        assert first.grad is not None and float(first.grad.abs().max()) > 0
        assert float(built.model.multi_modal_projector.linear_1.weight.grad.abs().max()) > 0
    # Of a kept token and its members: the gradient of its new value is its weight.
    cells = torch.randn(1, 8, 3, requires_grad=True)
    merge = Merge(torch.tensor([1, 1, 4]), torch.tensor([1, 6, 0]), torch.tensor([1.0, 0.5, 2.0]))
    kept = torch.zeros(1, 8, dtype=torch.bool)
    kept[0, [1, 4]] = True
    layout = Layout(torch.arange(8), 1, (2, 4))
    tokens = torch.randn(8, 3, requires_grad=True)
    (out,) = library.merged(merge, kept, [layout], cells, [tokens], [lambda f: 3 * f])
    out.sum().backward()
    want = torch.zeros(8)
    want[[1, 6, 0]] = torch.tensor([3.0, 1.5, 6.0])
    assert cells.grad is not None and tokens.grad is not None
    assert torch.equal(cells.grad[0], want[:, None].expand(8, 3))
    assert torch.equal(tokens.grad[:, 0], (~kept[0]).float()), "the others go on as they are"


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_without_a_merge_changes_no_bit(family: str) -> None:
    built = model(family)
    req = request(built, [2, 1])
    with torch.no_grad():
        plain = built(**req.inputs).logits
    logits, _, report = run(built, Every(step=1, merging=False), req.inputs)
    assert torch.equal(plain, logits) and report.members == []
    assert not torch.equal(plain, run(built, Every(step=2), req.inputs)[0][:, -plain.shape[1] :])


@pytest.mark.parametrize("name", list(ZOO))
def test_a_token_made_of_itself_stays_as_it_is(name: str) -> None:
    """In each family: the way of a cell to its token and through the projector is the host's."""
    entry = ZOO[name]
    built = entry.build()
    rows: list[list[Any]] = [["image", "image"], ["image"]]
    if "video" in entry.modalities:
        rows = [["video", "image"], ["image"]]
    req = entry.request(built, rows)
    alone = Every(step=1)
    plain = run(built, replace(alone, merging=False), req.inputs)[0]
    for pruner in (alone, replace(alone, projected=True)):
        logits, _, report = run(built, pruner, req.inputs)
        assert float((logits - plain).abs().max()) < 1e-4
        itself = [torch.arange(len(m)) for m in report.members]
        assert all(torch.equal(a, b) for a, b in zip(report.members, itself, strict=True))
    assert (
        float((run(built, Every(step=2), req.inputs)[0] - plain[:, -1:])[:, -1].abs().max()) > 1e-3
    )


def test_members_travel_through_a_stored_vision(tmp_path: Path) -> None:
    built = model("llava_next")
    req = request(built, [1, 2])
    later = {k: v for k, v in req.inputs.items() if k != "pixel_values"}
    with torch.no_grad(), Every(last=True)(built) as handle:
        wanted = built(**req.inputs).logits
        report = handle.report
        assert report is not None and len(report.members) == 3
        assert report.as_dict()["members"] == [m.tolist() for m in report.members]
        vision = handle.encode(**req.inputs)
        vision.save(tmp_path / "seen.safetensors")
        for one in (vision, Vision.load(tmp_path / "seen.safetensors").to("cpu")):
            assert torch.equal(built(**later, vision=one).logits, wanted)
            again = handle.report
            assert again is not None
            assert [m.tolist() for m in again.members] == [m.tolist() for m in report.members]
        # A file of before this entry existed.
        bare = replace(vision, items=tuple(replace(i, members=None) for i in vision.items))
        bare.save(tmp_path / "bare.safetensors")
        assert torch.equal(
            built(**later, vision=Vision.load(tmp_path / "bare.safetensors")).logits, wanted
        )
        assert handle.report is not None and handle.report.members == []
    for kept, members, layout in zip(report.kept, report.members, report.layouts, strict=True):
        assert len(members) == len(layout.labels) > len(kept)
        assert set(members.tolist()) == set(kept.tolist())
        assert members[kept].tolist() == kept.tolist()


@dataclass(frozen=True)
class First(Budgeted):
    """The first cells that are left, and what it was shown."""

    keep: int | float = 2
    views: list[EncoderView] = field(default_factory=list, repr=False)
    text_agnostic: ClassVar[bool] = True

    def select(self, view: EncoderView) -> Selection:
        self.views.append(view)
        return Selection(
            self.each(view, lambda cells, n: torch.arange(n).expand(len(cells), -1)), {}
        )


class Columns(Pruner):
    """Keeps of each layer's cache the visual tokens at four columns of eight."""

    def retain(self, layer: int, view: LayerView) -> Retention:
        kept = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1]).bool()
        share = torch.ones(len(view.images))
        return Retention(kept.expand(len(share), view.kv_heads, -1), share, share)


def test_a_later_stage_sees_merged_features() -> None:
    built = model()
    req = request(built, [1, 1])
    every, first = Every(last=True), First(keep=2)
    _, (seen,), report = run(built, every | first, req.inputs)
    before, after = every.views[-1], first.views[-1]
    for crop in range(2):
        for start in range(0, 16, 4):
            want = sum(before.features[crop, start + i] / (i + 1) for i in range(4))
            torch.testing.assert_close(after.features[crop, start], want)
        assert torch.equal(after.features[crop, 1], before.features[crop, 1])
    assert after.candidates.nonzero()[:, 1].tolist() == [0, 4, 8, 12] * 2
    # Of the four, two are left; what went into the others went nowhere.
    assert [k.tolist() for k in report.kept] == [[0, 4]] * 2
    assert report.members[0].tolist() == [0] * 4 + [4] * 4 + [-1] * 8
    alone = run(built, Every(last=True), req.inputs)[1][0]
    rows = _visual_rows(seen, req, report)
    whole = _visual_rows(alone, req, run(built, Every(last=True), req.inputs)[2])
    # Token 0 comes last by the first stage's wish, behind 4; whole has 4, 12, 0, 8.
    torch.testing.assert_close(rows[:2], whole[[0, 2]], rtol=1e-5, atol=1e-5)
    assert (rows[:2] - whole[[2, 0]]).abs().max() > 0.1

    # A cut cache's report goes by what stands at the columns that were kept, in order.
    report = run(built, Every(last=True) | Columns(), request(built, [2]).inputs)[2]
    for layer in report.cut:
        assert [[one.tolist() for one in head] for head in layer.kept] == [[[0, 4, 24, 28]]] * 2
    assert report.cut

    # The other way round, a merge among what is left.
    report = run(built, First(keep=6) | Every(), req.inputs)[2]
    assert report.members[0].tolist() == [0, 0, 0, 0, 4, 4] + [-1] * 10


def test_two_that_merge_are_refused() -> None:
    with pytest.raises(VlmpruneError, match="would both merge visual tokens; chain only one"):
        Every() | First() | Every(step=2)

    @dataclass(frozen=True)
    class Silent(Every):
        merges: ClassVar[bool] = False

    built = model()
    chain = Every() | Silent(step=2)
    with chain(built), pytest.raises(VlmpruneError, match=r"not the only stage .* that merges"):
        built(**request(built, [1]).inputs)
