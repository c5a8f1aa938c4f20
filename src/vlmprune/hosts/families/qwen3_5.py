"""Qwen3.5 and its mixture of experts: Qwen3-VL's tower without deepstack, a hybrid decoder."""

from __future__ import annotations

from vlmprune.hosts.families.qwen import family
from vlmprune.hosts.families.record import Family

_NOTE = (
    "as Qwen3-VL without deepstack; most decoder layers are recurrent (Gated DeltaNet), so pruning "
    "equals a prompt without the dropped tokens, and PLPHP and Recall act on the layers of full "
    "attention alone"
)

FAMILIES: dict[str, Family] = {
    "qwen3_5": family("Qwen3.5", "Qwen3_5ForConditionalGeneration", _NOTE),
    "qwen3_5_moe": family("Qwen3.5-MoE", "Qwen3_5MoeForConditionalGeneration", _NOTE),
}
