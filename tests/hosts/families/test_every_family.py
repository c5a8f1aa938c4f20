"""The oracle for every family of the table: pruned output equals masking, on the real classes.

The matrix is made from the zoo and `PROVED`, which is shown to users: a family is proved by adding
its record.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers

from answers import DIFFERENT, distance, generate
from masked import masking
from shortened import tolerance
from step_masks import masking_steps, masks_of
from stock import cache_of
from vlmprune import PLPHP, DivPrune, FastV, Recall, VisPruner, VlmpruneError
from vlmprune.hosts.families import FAMILIES, PROVED
from vlmprune.hosts.families.proved import ATTENTION, STAGES, STEPS, Stage
from vlmprune.runtime.family import family_of
from zoo import EVERY, UNATTENDED
from zoo.mended import forwards
from zoo_oracle import KNOWN, columns_of, dropped_columns, masked, others

pytestmark = pytest.mark.oracle

ALL = {**KNOWN, **UNATTENDED}


def choosing(name: str, **settings: Any) -> Any:
    """A method that chooses before the language model, by attention where something attends."""
    return (DivPrune if name in UNATTENDED else VisPruner)(**settings)


def batches(name: str) -> dict[str, list[list[Any]]]:
    """One image, several, a padded batch with a row without any; the same with videos."""
    without = ["image"] if ALL[name].images_first else []
    return {
        batch: [[*row] or without for row in rows] for batch, rows in PROVED[name].batches.items()
    }


def borrowers(built: Any, lender: int) -> list[int]:
    """The decoder layers that attend to a layer's keys and values, as the host's config says."""
    text = built.config.get_text_config()
    kinds, count = (
        getattr(text, "layer_types", None) or [],
        getattr(text, "num_kv_shared_layers", None) or 0,
    )
    first = len(kinds) - count
    if not count or lender >= first or kinds[lender] in kinds[lender + 1 : first]:
        return []
    return [layer for layer in range(first, len(kinds)) if kinds[layer] == kinds[lender]]


def test_every_record_is_proved() -> None:
    proved = set()
    for entry in ALL.values():
        family = family_of(entry.make())
        proved.add(next(key for key, one in FAMILIES.items() if one is family))
    refused = {type(entry.make()).__name__ for name, entry in EVERY.items() if name not in ALL}
    there = {name for name, family in FAMILIES.items() if hasattr(transformers, family.cls)}
    assert proved == {name for name in there if FAMILIES[name].cls not in refused}


def test_what_is_shown_as_proved_is_what_the_tests_have() -> None:
    assert ALL.keys() <= PROVED.keys()
    for name in PROVED.keys() - ALL.keys():
        # A fault of the installed release keeps it out, or the release has no such class.
        assert name in EVERY or not hasattr(transformers, FAMILIES[PROVED[name].record].cls)
    for name, entry in ALL.items():
        assert PROVED[name].media == entry.modalities
        assert entry.attends == ("attention" in PROVED[name].stages)
        assert PROVED[name].together != entry.one_placeholder


CASES = [
    (name, attention, batch)
    for name in ALL
    for attention, batch in product(ATTENTION, batches(name))
]
# Each batch under one attention, each attention with every other batch.
ALTERNATE = [
    (name, ATTENTION[(at + place) % len(ATTENTION)], batch)
    for at, name in enumerate(ALL)
    for place, batch in enumerate(batches(name))
]


@cache
def _made(name: str, attention: str) -> Any:
    return ALL[name].build(attention)


def model(name: str, attention: str = "sdpa") -> Any:
    """Made once, with nothing kept of former calls."""
    built = _made(name, attention)
    if hasattr(built.base_model, "rope_deltas"):
        built.base_model.rope_deltas = None
    return built


METHODS: dict[Stage, Any] = {
    "attention": VisPruner(keep=0.4),
    "features": DivPrune(keep=0.4),
    "cut": PLPHP(alpha=0.8, beta=0.6),
    "read": Recall(read=0.2),
    "rows": FastV(keep=0.4, layer=1),
}


def cases(stage: Stage) -> list[tuple[str, str, str]]:
    """Those in which a kind of method that acts on the cache is proved."""
    return [case for case in ALTERNATE if stage in PROVED[case[0]].stages]


@pytest.mark.parametrize(("name", "attention", "batch"), CASES)
def test_generate_equals_masking(name: str, attention: str, batch: str) -> None:
    entry = ALL[name]
    built = model(name, attention)
    req = entry.request(built, batches(name)[batch])
    policies = ["original"]
    if FAMILIES[built.config.model_type].rope is None:
        policies.append("compact")
    for policy in policies:
        with choosing(name, keep=0.4, positions=policy)(built) as handle:  # type: ignore[arg-type]
            pruned = generate(built, req.inputs)
        report = handle.report
        assert report is not None
        assert report.visual_tokens_before == sum(req.lengths)
        assert 0 < report.visual_tokens_after < 0.8 * report.visual_tokens_before
        expected = masked(built, req, dropped_columns(req, report), policy)
        assert len(expected.logits) == STEPS and torch.equal(pruned.sequences, expected.sequences)
        assert distance(pruned, expected) < tolerance(built)
        control = masked(built, req, dropped_columns(req, report, others(report)), policy)
        assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize(("name", "attention", "batch"), ALTERNATE)
def test_keeping_everything_changes_no_bit(name: str, attention: str, batch: str) -> None:
    entry = ALL[name]
    built = model(name, attention)
    req = entry.request(built, batches(name)[batch])
    plain = generate(built, req.inputs)
    with choosing(name, keep=1.0)(built):
        same = generate(built, req.inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    if forwards(req.inputs):
        with torch.no_grad():
            whole = built(**req.inputs)
            # Early releases of Gemma 3n give no cache back, and are refused for that.
            if cache_of(whole) is not None:
                with choosing(name, keep=1.0)(built):
                    assert torch.equal(whole.logits, built(**req.inputs).logits)
    with choosing(name, keep=0.5)(built):
        assert distance(plain, generate(built, req.inputs)) > 0


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_proved_is_refused(name: str) -> None:
    built = model(name)
    for stage, method in METHODS.items():
        assert type(method).__name__ == STAGES[stage][1]
        if stage in PROVED[name].stages:
            method.attach(built).detach()
        else:
            with pytest.raises(VlmpruneError, match=PROVED[name].refused[stage]):
                method.attach(built)


@pytest.mark.parametrize("name", [n for n in ALL if "features" in PROVED[n].stages])
def test_a_choice_by_features_equals_masking(name: str) -> None:
    entry = ALL[name]
    built = model(name)
    req = entry.request(built, batches(name)["padded batch"])
    with METHODS["features"](built) as handle:
        pruned = generate(built, req.inputs)
    report, policy = handle.report, handle.report.positions
    assert 0 < report.visual_tokens_after < 0.8 * report.visual_tokens_before
    expected = masked(built, req, dropped_columns(req, report), policy)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < tolerance(built)
    control = masked(built, req, dropped_columns(req, report, others(report)), policy)
    assert distance(pruned, control) > DIFFERENT


@pytest.mark.parametrize(("name", "attention", "batch"), cases("cut"))
def test_a_cut_cache_equals_masking(name: str, attention: str, batch: str) -> None:
    entry = ALL[name]
    built = model(name, attention)
    req = entry.request(built, batches(name)[batch])
    with PLPHP(alpha=0.8, beta=0.6, per_head="adaptive")(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.layers
    keep = {}
    lengths = [len(layout.labels) for layout in report.layouts]
    places: dict[int, list[int]] = {}
    for row, columns in columns_of(req, lengths):
        places.setdefault(row, []).extend(columns)
    for layer in report.layers:
        mask = torch.ones(*req.inputs["input_ids"].shape, dtype=torch.bool)
        mask = mask[:, None].repeat(1, len(layer.kept), 1)
        for head, rows in enumerate(layer.kept):
            for row, columns in places.items():
                mask[row, head, columns] = False
                mask[row, head, [columns[i] for i in rows[row].tolist()]] = True
        keep[layer.index] = mask
        keep |= dict.fromkeys(borrowers(built, layer.index), mask)
    with masking(built, keep):
        expected = generate(built, req.inputs)
    assert torch.equal(pruned.logits[0], expected.logits[0])
    assert distance(pruned, expected) < tolerance(built)
    assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.parametrize(("name", "attention", "batch"), cases("read"))
def test_a_cache_read_in_part_equals_masking_step_by_step(
    name: str, attention: str, batch: str
) -> None:
    entry = ALL[name]
    built = model(name, attention)
    req = entry.request(built, batches(name)[batch])
    with Recall(read=0.2, floor=0, rest="none", watch="tokens")(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert report is not None and report.reading is not None
    visual = torch.zeros_like(req.inputs["input_ids"], dtype=torch.bool)
    for row, columns in columns_of(req, [len(layout.labels) for layout in report.layouts]):
        visual[row, columns] = True
    masks = masks_of(report.reading, visual, cache_of(pruned))
    with masking_steps(built, masks):
        expected = generate(built, req.inputs)
    assert torch.equal(pruned.logits[0], expected.logits[0])
    assert distance(pruned, expected) < tolerance(built)
    assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.parametrize("name", [n for n in KNOWN if n in FAMILIES and FAMILIES[n].rope])
def test_three_positions_cannot_be_renumbered(name: str) -> None:
    with pytest.raises(VlmpruneError, match="renumbering would destroy"):
        VisPruner(keep=0.5, positions="compact").attach(KNOWN[name].build())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(ALL))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As near to masking as the type's rounding allows; exact where everything is kept."""
    entry = ALL[name]
    built = entry.build(entry.decoder_attention or "sdpa").to(dtype)
    req = entry.request(built, batches(name)["padded batch"])
    floats = {k: v.to(dtype) for k, v in req.inputs.items() if v.is_floating_point()}
    req.inputs |= floats
    plain = generate(built, req.inputs, max_new_tokens=2)
    with choosing(name, keep=1.0)(built):
        same = generate(built, req.inputs, max_new_tokens=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits, strict=True))
    with choosing(name, keep=0.4, positions="original")(built) as handle:
        # Rounding may turn a near-tie between two tokens; the first step is free of that.
        pruned = generate(built, req.inputs, max_new_tokens=1).logits[0].float()
    report = handle.report
    assert report is not None
    near, far = (
        masked(built, req, dropped_columns(req, report, kept), "original").logits[0].float()
        for kept in (None, others(report))
    )
    distances = (pruned - near).abs().max(), (pruned - far).abs().max()
    assert float(distances[0]) < 0.2 * float(distances[1])
