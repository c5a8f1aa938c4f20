"""vLLM: pruning inside its vision models, as a plugin that the variable VLMPRUNE turns on.

`VLMPRUNE="vispruner:keep=64" vllm serve llava-hf/llava-1.5-7b-hf`. The value is a spec as
`vlmprune run --method` takes it; `none` registers the classes and prunes nothing. vLLM calls
`register` in every process of a server, by the entry point group `vllm.general_plugins`.

Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

import os

from vlmprune.integrations.vllm.names import ARCHITECTURES, VARIABLE

__all__ = ["ARCHITECTURES", "VARIABLE", "register"]


def register() -> None:
    """Register the pruned classes, if VLMPRUNE is set; safe to call any number of times.

    Raises:
        SystemExit: the spec is wrong, or the method cannot serve; one sentence says why.
    """
    if not os.environ.get(VARIABLE, "").strip():
        return
    from vlmprune.errors import VlmpruneError
    from vlmprune.integrations.vllm import policy

    try:
        policy.from_environment()
    except VlmpruneError as error:
        # vLLM logs a plugin's exceptions and would go on to serve without pruning.
        raise SystemExit(f"{VARIABLE}: {error}") from None

    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from vlmprune.integrations.vllm.startup import config_hook, only_served

    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        MODELS_CONFIG_MAP[architecture] = config_hook(MODELS_CONFIG_MAP.get(architecture))
    only_served(ModelRegistry, ARCHITECTURES)
