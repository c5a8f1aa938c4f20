"""Which hidden state of a tower, and which of its tokens, become features, where a config says."""

from __future__ import annotations

from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.config import required
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.parts import Parts

# The config's entry that says which hidden state of the tower becomes features, and the one that
# says whether its first token is dropped.
LAYER = "vision_feature_layer"
_SELECTS = "vision_feature_select_strategy"
# The config's entry that names what is between the projector's two linear layers.
ACTIVATION = "projector_hidden_act"
SELECTS = Parts(fields=(_SELECTS,))


def strategy_of(model: Any, inputs: Inputs) -> str:
    """Which tokens of the tower are features: "default" drops the first, "full" drops none."""
    return str(inputs.get(_SELECTS) or required(model.config, _SELECTS))


def keeps_cls(model: Any, inputs: Inputs, has_cls: bool) -> bool:
    """Whether the CLS token itself is passed on as a visual token ("full" selection)."""
    strategy = strategy_of(model, inputs)
    if strategy == "default" and not has_cls:
        raise VlmpruneError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without a "
            "CLS token; set it to 'full' in the model's config."
        )
    return strategy == "full" and has_cls


def drops_cls(model: Any, has_cls: bool, does: str) -> None:
    """Refuse a model that passes CLS tokens on to something of its host that cannot take them.

    Args:
        model: the host.
        has_cls: whether its tower puts a CLS token first.
        does: what the host does with patches.

    Raises:
        VlmpruneError: it passes them on.
    """
    if keeps_cls(model, {}, has_cls):
        raise VlmpruneError(
            "vision_feature_select_strategy='full' passes CLS tokens on, which "
            f"{type(model).__name__} cannot {does}; set it to 'default' in the model's config."
        )
