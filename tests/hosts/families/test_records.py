"""Records are found by a class or its bases, and may come from outside of the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

import zoo
from answers import DIFFERENT, TOLERANCE, distance, generate
from tiny import dropped_columns, model, positions_of, request
from vlmprune import PLPHP, FastV, VisPruner, VlmpruneError
from vlmprune.hosts import families
from vlmprune.hosts.contract import ContractError
from vlmprune.hosts.families import FAMILIES, FILES, record_of, register
from vlmprune.runtime.family import family_of
from zoo import ZOO

pytestmark = pytest.mark.oracle


class Config(LlavaConfig):
    """With a type of its own."""

    model_type = "somebodys_llava"


class Sub(LlavaForConditionalGeneration):
    """Adds nothing."""


class Deeper(Sub):
    """Nor does this."""


def of(cls: type, config: Any = None) -> Any:
    """A tiny LLaVA of another class with the same weights."""
    built = model()
    other: Any = cls(config or built.config)
    other.load_state_dict(built.state_dict())
    other.set_attn_implementation("sdpa")
    other.generation_config = built.generation_config
    for module, twin in zip(other.modules(), built.modules(), strict=True):
        for name in ("scaling", "scale"):
            if isinstance(getattr(twin, name, None), float):
                setattr(module, name, getattr(twin, name))
    return other.eval()


def typed() -> Config:
    """The tiny model's config as one of that type."""
    return Config(**{k: v for k, v in model().config.to_dict().items() if k != "model_type"})


# --- Files


def test_a_record_is_one_short_file_with_its_tiny_builder() -> None:
    records = {file.__name__.rpartition(".")[2]: file for file in FILES}
    assert records.keys() == zoo.FILES.keys()
    for name, file in records.items():
        for one in (file, zoo.FILES[name]):
            assert len(Path(str(one.__file__)).read_text(encoding="utf-8").splitlines()) <= 150
        built = {kind.rpartition(":")[2] for kind in file.FAMILIES}
        assert built <= zoo.FILES[name].FAMILIES.keys()


# What is looked at above, and no file with records is left out of the list.
def test_every_file_with_records_is_listed() -> None:
    folder = Path(str(families.__file__)).parent
    with_records = {
        one.stem for one in folder.glob("*.py") if "\nFAMILIES: dict" in one.read_text("utf-8")
    }
    assert with_records == {file.__name__.rpartition(".")[2] for file in FILES}


# --- Bases


@pytest.mark.parametrize("cls", [Sub, Deeper])
@pytest.mark.parametrize("own_config", [False, True])
@pytest.mark.parametrize(
    "pruner", [VisPruner(keep=5), PLPHP(alpha=0.8, beta=0.6), FastV(keep=0.4, layer=1)]
)
def test_a_subclass_answers_as_its_base(cls: type, own_config: bool, pruner: Any) -> None:
    base, other = model(), of(cls, typed() if own_config else None)
    assert record_of(other) is FAMILIES["llava"]
    req = request(base, [1, 2], text=[4, 7])
    with pruner(base) as handle:
        wanted = generate(base, req.inputs)
    with pruner(other) as found:
        answer = generate(other, req.inputs)
    assert torch.equal(wanted.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(wanted.logits, answer.logits, strict=True))
    kept = zip(handle.report.kept, found.report.kept, strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    assert distance(wanted, generate(other, req.inputs)) > DIFFERENT


@pytest.mark.parametrize("name", list(ZOO))
def test_a_subclass_of_any_class_has_its_record(name: str) -> None:
    built = ZOO[name].make()
    wanted = record_of(built)
    built.__class__ = type("Own" + type(built).__name__, (type(built),), {})
    assert record_of(built) is wanted


def test_a_class_of_no_record_has_none() -> None:
    built = model()
    built.__class__ = type("Own", (LlavaForConditionalGeneration.__base__,), {})
    assert record_of(built) is None


Change = Callable[[Tensor], Tensor]


def encoding(change: Change) -> Any:
    """A tiny LLaVA whose encoder's visual tokens are changed by an override, each image's."""

    class Inner(LlavaModel):
        @functools.wraps(LlavaModel.get_image_features)
        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            output = super().get_image_features(*args, **kwargs)
            output.pooler_output = [change(one) for one in output.pooler_output]
            return output

    class Outer(LlavaForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Inner(config)

    return of(Outer)


def shifted(tokens: Tensor) -> Tensor:
    return tokens + torch.linspace(0, 1, len(tokens))[:, None]


@pytest.mark.parametrize("change", [lambda tokens: 2 * tokens, shifted])
def test_an_encoder_that_is_overridden_is_pruned_as_it_is(change: Change) -> None:
    """What the override makes of each visual token goes with it."""
    built = encoding(change)
    req = request(model(), [1, 2], text=[4, 7])
    with VisPruner(keep=5)(built) as handle:
        pruned = generate(built, req.inputs)
    dropped, mask = dropped_columns(req, handle.report.kept), req.inputs["attention_mask"]
    told = {
        "attention_mask": mask * ~dropped,
        "position_ids": positions_of(mask, dropped, "compact"),
    }
    assert distance(pruned, generate(built, req.inputs | told)) < TOLERANCE
    plain = model()
    assert distance(pruned, generate(plain, req.inputs | told)) > DIFFERENT


def test_an_override_that_moves_tokens_is_refused_by_the_first_call() -> None:
    built = encoding(lambda tokens: tokens.flip(0))
    req = request(model(), [1, 2])
    with (
        pytest.raises(ContractError, match="not made of the patches"),
        VisPruner(keep=5)(built),
    ):
        generate(built, req.inputs)


# --- From outside


def test_a_record_from_outside_comes_first(own_records: None) -> None:
    """Before that of a base, for a config's type of its own, and where one is replaced."""
    mine = replace(FAMILIES["llava"], name="mine", cls="Deeper")
    register("somebodys_llava", mine)
    assert FAMILIES["somebodys_llava"] is mine
    assert family_of(of(Deeper, typed())) is mine
    # Its config says LLaVA's type, but the class is nearer.
    assert family_of(of(Deeper)) is mine
    assert family_of(of(Sub, typed())) is FAMILIES["llava"]
    other = replace(mine, name="another")
    with pytest.raises(
        VlmpruneError, match=r"a record of 'somebodys_llava' already \(mine\).*replace=True"
    ):
        register("somebodys_llava", other)
    assert FAMILIES["somebodys_llava"] is mine
    register("somebodys_llava", other, replace=True)
    assert family_of(of(Deeper, typed())) is other


def test_a_record_of_a_tower(own_records: None) -> None:
    mine = replace(FAMILIES["llava"], name="with SigLIP")
    register("llava:siglip_vision_model", mine)
    assert family_of(model(kind="siglip")) is mine
    assert family_of(model()) is FAMILIES["llava"]


@pytest.mark.parametrize("kind", ["", ":siglip", "llava:", "a:b:c", 5])
def test_a_kind_that_is_no_type_is_refused(kind: Any) -> None:
    with pytest.raises(VlmpruneError, match="must be the model_type of a config"):
        register(kind, FAMILIES["llava"])


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(VlmpruneError, match=r"must be a vlmprune\.hosts\.families\.Family"):
        register("somebodys_llava", "llava")  # type: ignore[arg-type]
