"""What the plugin is called by: variables of the environment, and the architectures it serves."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "VLMPRUNE"
"""Turns the plugin on: a spec, or "none"."""
JOURNAL = "VLMPRUNE_VLLM_RECORD"
"""Names a folder for the journal of what was kept, for tests."""

# The architectures served, and our classes of them, which vLLM imports when it needs them.
ARCHITECTURES: Mapping[str, str] = {
    "LlavaForConditionalGeneration": "llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "llava:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava:PrunedLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "qwen:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen:PrunedQwen3VL",
    "InternVLForConditionalGeneration": "internvl:PrunedInternVL",
}
