"""VideoLLM-MoD: most visual tokens of a frame skip every other layer of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.hosts import sizes
from vlmprune.hosts.decoder import decoder_layers
from vlmprune.methods.bases.layered import check_layers
from vlmprune.methods.bases.learned import Learned
from vlmprune.select.budget import plain_keep
from vlmprune.select.routing import routed
from vlmprune.select.settings import check_count
from vlmprune.views import FrameView, Routed

# How far an untrained router's weights are from nought: enough to tell tokens apart, and little
# beside its bias of one, with which a layer's output is the host's.
SPREAD = 1e-3


@dataclass(frozen=True)
class MoD(Learned):
    """Let most visual tokens of each frame pass every other decoder layer by.

    Before such a layer a linear router scores the visual tokens. Of each frame the best go through
    the layer, with the text; the others keep their states and come back for the next layer. What
    the layer adds to a visual token's state is multiplied by its score, so that the router learns.
    No token is removed: tokens that skip a layer are absent from its KV cache alone, and keep
    their positions. What a frame keeps depends on nothing behind it, so that a stream may be fed
    frame by frame.

    Paper: "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision
    Computation", arXiv 2408.16730 (NeurIPS 2024), section 3.2; the authors published no code.

    Attributes:
        weights: a folder as `vlmprune train mod` writes it, or the name of weights that come with
            the embedded model. It fixes which layers are skipped and how many tokens of each frame
            they work on (20 % in every other layer, the paper's setting).
        positions: of a pruner before it in a chain; the method itself never renumbers.

    Where it deviates from the paper: an image counts as a frame, all of its crops together; the
    first layer that is skipped is the second, so that the first sees every token (our reading);
    the score multiplies what attention and feed-forward add, so that a score of one is the layer
    as it is, and the router has a bias that begins there; scores of text are one, for text always
    goes through; ties go to the lower index.

    Shapes: hidden [B, V, D] → kept [B, V], weight [B, V].

    Raises:
        VlmpruneError: there are no such weights, or they are not of this method.
    """

    method: ClassVar[str] = "mod"
    needs: ClassVar[str] = "decoder layers with full or sliding-window attention"
    stage: ClassVar[str] = "inside the language model"
    paper: ClassVar[str] = "arXiv 2408.16730"
    text_agnostic: ClassVar[bool] = True
    training: ClassVar[str] = "module and LoRA"

    @classmethod
    def fitted(
        cls, model: Any, keep: int | float = 0.2, every: int = 2, first: int = 1
    ) -> dict[str, Any]:
        """The settings of fresh routers for a host.

        Args:
            model: the host.
            keep: visual tokens of each frame that such a layer works on: an int counts them, a
                float in (0, 1] is a fraction; 0.2 in the paper.
            every: from one such layer to the next; 2 in the paper.
            first: number of the first such layer, counted from 0; at least 1.

        Raises:
            VlmpruneError: a value is out of range, or the model too shallow.
        """
        keep = plain_keep(keep)
        check_count("every", every)
        check_count("first", first)
        depth = len(decoder_layers(model))
        check_layers(depth, first + 1, "MoD")
        return {
            "keep": keep,
            "layers": list(range(first, depth, every)),
            "language": sizes.decoder_width(model.config),
        }

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> nn.Module:
        """Untrained routers of these settings."""
        return Routers(settings)

    def skips(self, depth: int) -> tuple[int, ...]:
        """The layers that have a router."""
        return tuple(self.settings["layers"])

    def route(self, layer: int, view: FrameView) -> Routed:
        """The best of each frame, and their scores."""
        routers = self.on(view.hidden.device)
        assert isinstance(routers, Routers)
        weight, bias = routers.of(layer)
        keep = self.settings["keep"]
        return Routed(*routed(view.hidden, weight, bias, view.frames, view.counts, keep))


class Routers(nn.Module):
    """One linear map to a score for each layer that tokens may skip.

    Attributes:
        routers: by the layer's number.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.routers = nn.ModuleDict(
            {str(layer): nn.Linear(settings["language"], 1) for layer in settings["layers"]}
        )
        for router in self.routers.values():
            assert isinstance(router, nn.Linear)
            nn.init.normal_(router.weight, std=SPREAD)
            nn.init.ones_(router.bias)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """[D] weight and scalar bias of a layer's router."""
        router = self.routers[str(layer)]
        assert isinstance(router, nn.Linear)
        return router.weight[0], router.bias[0]
