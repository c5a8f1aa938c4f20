"""Pairs of language model and visual tokens that cost the same FLOPs at prefill.

The question of "Inference Optimal VLMs Need Only One Visual Token but Larger Models" (arXiv
2411.03312): of a fixed budget, is it better spent on tokens or on parameters? The pairs are
arithmetic; which of them answers best is for a measurement to say (`docs/results.md` has a small
one). Text tokens count here, unlike in the published tables of pruning, because a larger model
pays for them too: at Q text tokens the paper's cost is proportional to parameters · (Q + V).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmprune import costs
from vlmprune.costs.architectures import DECODERS
from vlmprune.costs.plan import architecture
from vlmprune.costs.units import TERA, ready
from vlmprune.errors import VlmpruneError, meant
from vlmprune.hosts import layer_sizes


@dataclass(frozen=True)
class Pair:
    """A language model with the most visual tokens that a budget allows it.

    Attributes:
        model: its name.
        parameters: of its decoder layers, embeddings and head not counted; of experts those that a
            token goes through.
        visual_tokens: the most that fit; None where even none costs more than the budget, or the
            costs are unknown.
        tflops: what they cost together with the text, 1e12 FLOPs.
        kv_bytes: keys and values of visual and text tokens over all layers.

    What the config does not tell is `costs.UNKNOWN`, and None in `as_dict`.
    """

    model: str
    parameters: float
    visual_tokens: int | None
    tflops: float
    kv_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        made: dict[str, Any] = ready(asdict(self))
        return made


def budget_of(text: str, text_tokens: int, per_multiply_add: int = costs.PER_MULTIPLY_ADD) -> float:
    """What `--compute-budget` says, in TFLOPs.

    Args:
        text: a number of TFLOPs, or `MODEL@TOKENS`: what that model spends on so many visual
            tokens and the text.
        text_tokens: of a prompt.
        per_multiply_add: as `costs.prefill_flops` takes it.

    Raises:
        VlmpruneError: neither, or what that model spends is unknown.
    """
    model, at, tokens = text.rpartition("@")
    if at:
        if not tokens.isascii() or not tokens.isdigit():
            raise VlmpruneError(
                f"--compute-budget {text} has no number of visual tokens behind the @; write for "
                "example llava-1.5-7b@576."
            )
        spent = costs.prefill_flops(_decoder(model), int(tokens) + text_tokens, per_multiply_add)
        if math.isnan(spent):
            raise VlmpruneError(
                f"what {model} spends is unknown, as its config does not tell; give "
                "--compute-budget as a number of TFLOPs."
            )
        return spent / TERA
    try:
        tflops = float(text)
    except ValueError:
        tflops = math.nan
    if not (math.isfinite(tflops) and tflops > 0):
        raise VlmpruneError(
            f"--compute-budget {text} is neither a positive number of TFLOPs nor MODEL@TOKENS; "
            "write for example 8 or llava-1.5-7b@576."
        )
    return tflops


def pairs(
    tflops: float,
    text_tokens: int = 50,
    models: Sequence[str] = (),
    kv_value_bytes: int = 2,
    per_multiply_add: int = costs.PER_MULTIPLY_ADD,
) -> list[Pair]:
    """For each language model the most visual tokens that its prefill can have for a budget.

    Args:
        tflops: the budget: prefill of the decoder layers, visual and text tokens together. The
            vision tower is paid whatever the language model is, and not counted.
        text_tokens: tokens of the prompt that are not visual; 0 where they are cached.
        models: names of `DECODERS` or of `SHAPES`, or local folders with a `config.json`; by
            default all of `DECODERS`.
        kv_value_bytes: bytes of one cached number.
        per_multiply_add: as `costs.prefill_flops` takes it.

    Returns:
        The pairs, smallest model first; those of unknown size last.

    Raises:
        VlmpruneError: a value is out of range, or a model unknown.
    """
    if text_tokens < 0:
        raise VlmpruneError(f"text_tokens={text_tokens} is negative; use 0 or more.")
    if not (math.isfinite(tflops) and tflops > 0):
        raise VlmpruneError(f"a budget of {tflops} TFLOPs is not positive; use more than 0.")
    found = []
    # What a model itself spends, carried through TFLOPs, must still buy the same tokens.
    flops = tflops * TERA * (1 + 1e-12)
    for name in dict.fromkeys(models or DECODERS):
        config = _decoder(name)
        size = _parameters(config)
        if math.isnan(costs.prefill_flops(config, 1)):
            kv_bytes = costs.kv_bytes(config, text_tokens, kv_value_bytes)
            found.append(Pair(name, size, None, costs.UNKNOWN, kv_bytes))
            continue
        tokens = _most(config, flops, text_tokens, per_multiply_add)
        held = text_tokens + (tokens or 0)
        spent = costs.spent(config, [held], kv_value_bytes, per_multiply_add)
        found.append(Pair(name, size, tokens, spent.flops / TERA, spent.kv_bytes))
    return sorted(found, key=lambda pair: (math.isnan(pair.parameters), pair.parameters))


def _most(config: Any, flops: float, text: int, per_multiply_add: int) -> int | None:
    """The largest number of visual tokens whose prefill with the text stays within `flops`."""

    def fits(tokens: int) -> bool:
        return costs.prefill_flops(config, text + tokens, per_multiply_add) <= flops

    if not fits(0):
        return None
    least, beyond = 0, 1
    while fits(beyond):
        least, beyond = beyond, beyond * 2
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if fits(middle):
            least = middle
        else:
            beyond = middle
    return least


def _parameters(config: Any) -> float:
    """Weights of the decoder layers' matrices."""
    found = layer_sizes.layers(config)
    return costs.UNKNOWN if found is None else sum(one.weights for one in found)


def _decoder(name: str) -> Any:
    if name in DECODERS:
        return DECODERS[name]
    try:
        return architecture(name)
    except VlmpruneError as error:
        raise VlmpruneError(
            f"{str(error).rstrip('.')}; of language models alone {', '.join(DECODERS)} are known"
            f"{meant(name, DECODERS)}."
        ) from error
