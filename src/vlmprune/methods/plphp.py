"""PLPHP: a KV cache of which every layer keeps its own share and every head its own tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from vlmprune.errors import VlmpruneError, meant
from vlmprune.files import parsed
from vlmprune.pruner import Pruner
from vlmprune.select import retention
from vlmprune.select.settings import check_choice, check_whole, is_share
from vlmprune.views import LayerView, Retention

# How a layer's budget is shared among its KV heads.
PerHead = Literal["equal", "adaptive"]


@dataclass(frozen=True, eq=False)
class Levels:
    """What layers keep that are vision-indifferent, ordinary and vision-attentive.

    Attributes:
        thresholds: [2] float32 beta and alpha.
        rates: [3] float32 retention rates.
        keep: [3, B, I] int64; how many tokens of each image.
        rows: [B] int64 numbers of the samples.
    """

    thresholds: torch.Tensor
    rates: torch.Tensor
    keep: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class PLPHP(Pruner):
    """Cut the visual tokens out of the KV cache after prefill, per layer and per KV head.

    Prefill is whole, so the first generated token is the unpruned model's. As it leaves a layer,
    that layer's cache is cut: layers that attend much to the image keep more of it, and every KV
    head keeps the tokens that its own query heads attend to. All other tokens stay.

    Paper: "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language
    Models", arXiv 2502.14504; there is no released code.

    Attributes:
        r: retention rate of an ordinary layer. 0.4 is our reading.
        dr: what a vision-attentive layer keeps more, and a vision-indifferent one less; the
            three-level rule is the paper's, 0.3 is our reading.
        alpha: vision attention γ from which a layer is vision-attentive. 0.25 is our reading;
            `vlmprune calibrate` finds a model's own.
        beta: γ below which a layer is vision-indifferent. 0.1 is our reading, see `alpha`.
        first_pruned_layer: layers before it are left whole. 0 is our reading.
        window: how many of the prompt's last tokens are asked what they attend to. 1, the last
            token alone, is our reading; on long answers of the embedded model 8 keeps much more
            of the accuracy (docs/plphp.md).
        per_head: "equal" gives every KV head the same number (the paper); "adaptive" shares one
            budget a layer among its heads by their attention (AdaKV's idea; not the paper's).
        max_layer_bytes: upper limit, in bytes, of what one layer keeps of one sample's prompt,
            all heads together; where the rates ask for more, every image gives way alike.
            None, the default, sets none; not the paper's.
        calibrated_on: the architecture that alpha and beta were calibrated on, see `from_file`;
            on any other the pruner refuses to be attached. None: not checked.
        coverage: share of each image's budget in each KV head that goes to tokens spread evenly
            over the image, others in each head and layer, whatever is attended to; the rest goes
            to the most attended of the others. 0 is the paper; on long answers of the embedded
            model 0.75 keeps much more of the accuracy (docs/plphp.md).

    γ is the attention that the last prompt token gives to visual tokens, summed over them and
    averaged over the query heads: 0 to 1. Per image max(1, round(rate · tokens)) are kept, half
    rounded up, the most attended by the mean over the query heads of a KV head's group, ties to
    the lower index. These are readings too, but for the budget per image, which is the paper's.
    A later turn on the same cache asks its own last token, for its own images.

    Where it deviates from the paper: every sample of a batch has its own γ and rate; newline
    tokens among an image's placeholders count as visual tokens; sliding-window and
    linear-attention layers are left whole.

    Shapes: attention [B, Hq, V] → kept [B, H, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    r: float = 0.4
    dr: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    first_pruned_layer: int = 0
    window: int = 1
    per_head: PerHead = "equal"
    max_layer_bytes: int | None = None
    calibrated_on: str | None = None
    coverage: float = 0.0

    needs: ClassVar[str] = "attention of the last prompt token, KV cache"
    stage: ClassVar[str] = "KV cache, after prefill"
    paper: ClassVar[str] = "arXiv 2502.14504"
    text_agnostic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("r", "dr", "alpha", "beta", "coverage"):
            value = getattr(self, name)
            if not is_share(value):
                raise VlmpruneError(f"{name}={value!r} is not a number from 0 to 1.")
        if self.r - self.dr < 0 or self.r + self.dr > 1 + 1e-9 or self.r == 0:
            raise VlmpruneError(
                f"r={self.r} with dr={self.dr} gives rates from {self.r - self.dr:g} to "
                f"{self.r + self.dr:g}; choose them so that r > 0 and all lie within 0 and 1, as "
                "r=0.4 with dr=0.3 does."
            )
        if self.beta > self.alpha:
            raise VlmpruneError(
                f"beta={self.beta} is above alpha={self.alpha}; beta is the lower threshold."
            )
        for name, least in (("first_pruned_layer", 0), ("window", 1), ("max_layer_bytes", 1)):
            if name != "max_layer_bytes" or self.max_layer_bytes is not None:
                check_whole(name, getattr(self, name), least)
        check_choice("per_head", self.per_head, PerHead)

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> PLPHP:
        """The settings that `vlmprune calibrate` wrote.

        Args:
            path: its JSON file.
            changes: fields to set otherwise.

        Raises:
            VlmpruneError: the file cannot be read, holds no calibration, or was made with another
                window.
        """
        try:
            content = parsed(Path(path).read_text(encoding="utf-8"))
            found = dict(content["plphp"])
        except OSError as error:
            raise VlmpruneError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError) as error:
            raise VlmpruneError(
                f"{str(path)!r} is no calibration; make one with `vlmprune calibrate`."
            ) from error
        known = {field.name for field in fields(cls)}
        unknown = sorted({*found, *changes} - known)
        if unknown:
            near = meant(unknown[0], known)
            raise VlmpruneError(
                f"PLPHP has no setting {unknown[0]!r}{near}; it has {', '.join(known)}."
            )
        before, now = (settings.get("window", cls.window) for settings in (found, found | changes))
        if before != now and not {"alpha", "beta"} <= changes.keys():
            raise VlmpruneError(
                f"{str(path)!r} was calibrated with window={before}, not {now}; run `vlmprune "
                f"calibrate --window {now}`, or give alpha and beta as well."
            )
        return cls(**(found | changes))

    def check_prompt(self, others: int, images: int, heads: int, token_bytes: int) -> None:
        """Refuse a `max_layer_bytes` below what text and one token an image and head take."""
        least = (others + images * heads) * token_bytes
        if self.max_layer_bytes is not None and self.max_layer_bytes < least:
            raise VlmpruneError(
                f"max_layer_bytes={self.max_layer_bytes} is below the {least} bytes that the text "
                f"and one token of each image take; use at least {least}."
            )

    def leaves_whole(self, layer: int) -> bool:
        """Whether a layer stands before those that are cut."""
        return layer < self.first_pruned_layer

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """What a layer's KV heads keep; None leaves the layer whole."""
        return None if self.leaves_whole(layer) else self._retain(layer, view)

    def retain_together(self, layers: torch.Tensor, view: LayerView) -> Retention:
        """The same of several layers at once, none of which is left whole."""
        return self._retain(layers, view)

    def _retain(self, layer: int | torch.Tensor, view: LayerView) -> Retention:
        gamma = view.attention.sum(dim=2).mean(dim=1)
        levels = view.notes.get("levels")
        if levels is None:
            levels = view.notes["levels"] = self._levels(gamma, view.counts)
        # How many of the two thresholds γ reaches.
        level = torch.bucketize(gamma, levels.thresholds, right=True)
        rate, keep = levels.rates[level], levels.keep[level, levels.rows]
        if self.max_layer_bytes is not None:
            room = (self.max_layer_bytes // view.token_bytes - view.others) // view.kv_heads
            keep = retention.within(keep, room)
        scores = view.attention.unflatten(1, (view.kv_heads, -1)).mean(dim=2)
        if self.coverage > 0:
            share = self.coverage
            scores = retention.covering(scores, view.images, view.counts, keep, share, layer)
        choose = retention.shared if self.per_head == "adaptive" else retention.per_image
        return Retention(choose(scores, view.images, keep, alone=view.one_image), gamma, rate)

    def _levels(self, gamma: torch.Tensor, counts: torch.Tensor) -> Levels:
        """What each level keeps, the same in all layers of a prompt."""
        # The three rates are worked out once, in Python's precision, whatever the device has.
        rates = gamma.new_tensor([self.r - self.dr, self.r, self.r + self.dr], dtype=torch.float32)
        # Rounding half up, with room for float32's error in rates such as 0.1.
        keep = (rates[:, None, None] * counts + 0.5 + 1e-4).floor().long()
        return Levels(
            gamma.new_tensor([self.beta, self.alpha], dtype=torch.float32),
            rates,
            keep.clamp(min=1).minimum(counts),
            torch.arange(len(counts), device=gamma.device),
        )
