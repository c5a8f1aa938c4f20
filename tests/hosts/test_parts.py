"""What a record relies on is there at attach, or the host is refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from vlmprune import PLPHP, VisPruner, VlmpruneError
from vlmprune.hosts import config, contract, parts, sizes
from vlmprune.hosts.families import FAMILIES, check_host
from vlmprune.hosts.parts import Parts
from vlmprune.runtime.family import family_of
from zoo import ZOO

pytestmark = pytest.mark.oracle

RELEASE = transformers.__version__
NAMES = [name for name in ZOO if name in FAMILIES]
PRUNER = VisPruner(keep=0.5)

# What a config says of how features are taken is relied on where the installed release has it; a
# record that stopped requiring it would go on with a guess.
TAKING = ("vision_feature_layer", "vision_feature_select_strategy")
# What single families' configs say besides.
OWN_FIELDS = {
    "qwen2_5_vl": {"vision_config.fullatt_block_indexes", "vision_config.window_size"},
    "qwen3_vl": {"vision_config.deepstack_visual_indexes"},
    "llava_next": {"image_grid_pinpoints"},
    "llava_onevision": {"image_grid_pinpoints", "vision_aspect_ratio"},
    "llava_next_video": {"spatial_pool_stride"},
    "qwen3_vl_moe": {"vision_config.deepstack_visual_indexes"},
    "cosmos3_omni": {"vision_config.deepstack_visual_indexes"},
    "cohere_compass": {"vision_config.deepstack_visual_indexes"},
    "mistral3": {"spatial_merge_size"},
    "mistral_large4": {"spatial_merge_size"},
    "internvl": {"downsample_ratio"},
    "llama4": {"vision_config.pixel_shuffle_ratio"},
    "gemma4": {"vision_config.pooling_kernel_size"},
}


def relied_on(name: str) -> Parts:
    """All parts of all modalities of a family."""
    whole = Parts()
    for medium in FAMILIES[name].media:
        whole |= medium.required()
    return whole


def built(name: str) -> Any:
    return ZOO[name].build()


def hide(held: Any, missing: str) -> type:
    """Let an object lack an attribute from now on, as if its class had never had it.

    Returns:
        Its class, by which it is given back.
    """
    kind = type(held)

    def lookup(self: Any, name: str) -> Any:
        if name == missing:
            raise AttributeError(name)
        return kind.__getattribute__(self, name)

    def fallback(self: Any, name: str) -> Any:
        if name == missing:
            raise AttributeError(name)
        return kind.__getattr__(self, name)

    methods = {"__getattribute__": lookup, "__module__": kind.__module__}
    if hasattr(kind, "__getattr__"):
        methods["__getattr__"] = fallback
    object.__setattr__(held, "__class__", type(kind.__name__, (kind,), methods))
    return kind


def fields() -> Iterator[Any]:
    for name in NAMES:
        for field in relied_on(name).fields:
            yield pytest.param(name, field, id=f"{name}-{field}")


@pytest.mark.parametrize(("name", "field"), list(fields()))
def test_a_config_that_lost_a_field_is_refused(name: str, field: str) -> None:
    model = built(name)
    *place, last = field.split(".")
    held = model.config
    for part in place:
        held = getattr(held, part)
    hide(held, last)
    sentence = f"{type(held).__name__} has no field {last!r} under transformers {RELEASE}"
    with pytest.raises(VlmpruneError, match=re.escape(sentence)):
        PRUNER.attach(model)
    assert not {"forward", "generate"} & set(vars(model))


def paths() -> Iterator[Any]:
    for name in NAMES:
        whole = relied_on(name)
        for path in (*whole.attributes, *(one for one in whole.functions if ":" not in one)):
            yield pytest.param(name, path, id=f"{name}-{path}")


@pytest.mark.parametrize(("name", "path"), list(paths()))
def test_a_module_or_function_that_is_gone_is_refused(name: str, path: str) -> None:
    model = built(name)
    *place, last = path.split(".")
    held = model
    for part in place:
        held = getattr(held, part)
    hide(held, last)
    sentence = f"has no {path} in transformers {RELEASE} ({last} is missing)"
    with pytest.raises(VlmpruneError, match=re.escape(sentence)):
        check_host(model, FAMILIES[name])
    # The control: with the contract off nothing is looked at.
    with contract.switched_off():
        check_host(model, FAMILIES[name])


def arguments() -> Iterator[Any]:
    for name in NAMES:
        for path, names in relied_on(name).functions.items():
            for one in names:
                yield pytest.param(name, path, one, id=f"{name}-{path}-{one}")


@pytest.mark.parametrize(("name", "path", "argument"), list(arguments()))
def test_a_function_that_takes_another_argument_is_refused(
    name: str, path: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts._arguments
    monkeypatch.setattr(parts, "_arguments", lambda function: real(function) - {argument})
    with pytest.raises(VlmpruneError, match=f"takes no .*in transformers {re.escape(RELEASE)}"):
        check_host(built(name), FAMILIES[name])


@pytest.mark.parametrize("name", NAMES)
def test_whole_hosts_are_let_through(name: str) -> None:
    model = built(name)
    check_host(model, family_of(model))
    config.check_text(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_config_says_is_relied_on(name: str) -> None:
    """Held here apart from the records, by the config classes of the release that is installed."""
    found = set(relied_on(name).fields)
    assert OWN_FIELDS.get(name, set()) <= found
    said = built(name).config
    for field in TAKING:
        assert hasattr(said, field) == (field in found), field
    for field in ("window_size", "fullatt_block_indexes", "deepstack_visual_indexes"):
        own = f"vision_config.{field}"
        assert hasattr(said.vision_config, field) == (own in found), field


@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_that_lost_a_field_is_refused(name: str) -> None:
    """Not read with a default: as many KV heads as heads, or full attention everywhere."""
    model = built(name)
    text = config.of_text(model.config)
    known = config._TEXTS[config.model_type(text)]
    for field in ("num_key_value_heads", *known):
        assert has(text, field)
    for field in known:
        if config.differs(text, field):
            # It is read of each layer's own config, which is made of the whole one's.
            continue
        kind = hide(text, field)
        for pruner in (PRUNER, PLPHP(r=0.5)):
            with pytest.raises(VlmpruneError, match=f"no field '{field}'"):
                pruner.attach(model)
        object.__setattr__(text, "__class__", kind)
    check_host(model, FAMILIES[name])


def has(text: Any, field: str) -> bool:
    """Whether a config has a field, if only for each layer one of its own."""
    return config.differs(text, field) or hasattr(text, field)


def test_optional_fields_are_all_that_a_config_of_the_release_has() -> None:
    """Of each type the table has every field that is read with a default elsewhere."""
    optional = {field for known in config._TEXTS.values() for field in known}
    for kind, known in config._TEXTS.items():
        if kind not in transformers.CONFIG_MAPPING:
            # Of a class of a later release, which a test of those holds to come then.
            continue
        made = transformers.AutoConfig.for_model(kind)
        assert {field for field in optional if has(made, field)} == set(known), kind
    # GLM's towers have a field of a name that others have with another meaning.
    own = {kind: known for kind, known in sizes._TOWERS.items() if not kind.startswith("glm")}
    towers = {field for known in own.values() for field in known}
    for kind in ("qwen2_5_vl", "qwen2_vl"):
        tower = transformers.AutoConfig.for_model(kind).vision_config
        assert {field for field in towers if hasattr(tower, field)} == set(
            sizes._TOWERS[tower.model_type]
        )
    for kind in ("dinov2", "dinov2_with_registers"):
        tower = transformers.AutoConfig.for_model(kind)
        assert {field for field in towers if hasattr(tower, field)} == set(sizes._TOWERS[kind])


def test_a_function_of_a_module_that_is_gone_is_told() -> None:
    with pytest.raises(VlmpruneError, match=f"{re.escape(RELEASE)} has no lost in vision_utils"):
        parts.function("vision_utils:lost")
    with pytest.raises(VlmpruneError, match="has no lost in nowhere"):
        parts.function("nowhere:lost")
