"""What the self-check finds wrong with a model of no record, each told at attach by its reason."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cohere2VisionForConditionalGeneration

from unrecorded import cohere2_vision, loud
from vlmprune import VisPruner, VlmpruneError


def made() -> Any:
    """A model of a class of its own, as a class with a config is tried once."""
    torch.manual_seed(0)
    name = Cohere2VisionForConditionalGeneration.__name__
    return loud(type(name, (Cohere2VisionForConditionalGeneration,), {})(cohere2_vision().config))


def featuring(change: Callable[[Any, Tensor], Any]) -> Callable[[Any], None]:
    """A model whose features are changed: of its output, and of its pixels."""

    def apply(built: Any) -> None:
        own = built.model.get_image_features

        def features(self: Any, pixel_values: Tensor, **rest: Any) -> Any:
            output = own(pixel_values, **rest)
            change(output, output.pooler_output)
            return output

        built.model.get_image_features = MethodType(features, built.model)

    return apply


def stacked(tokens: Any) -> Tensor:
    """[images, tokens, width], in whatever form the host has them."""
    whole = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
    return whole.flatten(1, -2)


def deep(output: Any, tokens: Any) -> None:
    output.deepstack_features = [stacked(tokens)]


def alone(output: Any, tokens: Any) -> None:
    output.pooler_output = stacked(tokens).detach()


def fewer(output: Any, tokens: Any) -> None:
    output.pooler_output = stacked(tokens)[:, 1:]


def together(output: Any, tokens: Any) -> None:
    whole = stacked(tokens)
    output.pooler_output = whole + (whole.sum(0) - whole) / 8


def without_a_decoder(built: Any) -> None:
    def get_decoder(self: Any) -> Any:
        raise AttributeError("decoder")

    built.get_decoder = MethodType(get_decoder, built)


def past_hooks(built: Any) -> None:
    """The projector is run by its function, so that nobody sees what it is given."""

    def features(self: Any, pixel_values: Tensor, **rest: Any) -> Any:
        output = self.vision_tower(pixel_values)
        output.pooler_output = self.multi_modal_projector.forward(output.last_hidden_state)
        output.pooler_output = output.pooler_output.flatten(1, 2)
        return output

    built.model.get_image_features = MethodType(features, built.model)


class Mixing(nn.Module):
    """Mixes patches by weights of its own, with no attention that anybody could look at."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states - hidden_states.mean(dim=1, keepdim=True), None


def mixing(built: Any) -> None:
    for layer in layers(built):
        layer.self_attn = Mixing()


class Halves(nn.Module):
    """Each half of the patches attends to itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
        rows = hidden_states.unflatten(1, (2, -1)).flatten(0, 1)
        return self.inner(rows, **rest)[0].reshape(hidden_states.shape), None


def by_halves(built: Any) -> None:
    for layer in layers(built):
        layer.self_attn = Halves(layer.self_attn)


def layers(built: Any) -> nn.ModuleList:
    (found,) = (
        module
        for name, module in built.model.vision_tower.named_modules()
        if name.endswith("layers")
    )
    return found


CASES: dict[str, Callable[[Any], None]] = {
    "later layers of its language model are given features, too": featuring(deep),
    "its image features do not come from its tower's layers by gradients": featuring(alone),
    "it makes 8 visual tokens of 6 x 6 patches": featuring(fewer),
    "its image features depend on the other images of a batch": featuring(together),
    "its language model is not found": without_a_decoder,
    "no module is given the features of its patches": past_hooks,
    "its vision tower's attention cannot be read": mixing,
    "its vision tower does not attend to all patches of an image at once": by_halves,
}


@pytest.mark.parametrize("why", CASES)
def test_what_does_not_fit_is_told(why: str) -> None:
    VisPruner(keep=0.5).attach(made()).detach()
    built = made()
    CASES[why](built)
    said = f"^vlmprune cannot follow {type(built).__name__}: {why}; `vlmprune models` lists"
    with pytest.raises(VlmpruneError, match=said):
        VisPruner(keep=0.5).attach(built)
