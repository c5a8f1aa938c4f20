"""What is checked and arranged before a server starts: unfit models and settings are refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vlmprune.errors import VlmpruneError
from vlmprune.integrations.vllm import policy as policies
from vlmprune.integrations.vllm.names import ARCHITECTURES, VARIABLE
from vlmprune.pruner import Pruner


def stop(sentence: str) -> NoReturn:
    """End the process with one sentence."""
    raise SystemExit(f"{VARIABLE}: {sentence}")


def only_served(registry: Any, architectures: Mapping[str, str]) -> None:
    """Refuse models that are not served pruned, which would run unpruned in silence."""
    if hasattr(registry, "_vlmprune"):
        return
    original = registry.inspect_model_cls

    def inspect_model_cls(names: Any, model_config: Any) -> Any:
        given = [names] if isinstance(names, str) else list(names)
        drafts = getattr(model_config, "runner_type", "") == "draft"
        own = any(name in architectures for name in given)
        if not drafts and (not own or model_config.model_impl not in ("auto", "vllm")):
            stop(
                f"{', '.join(given) or 'a model without an architecture'} is not served pruned; "
                f"serve one of {', '.join(architectures)} by vLLM's own model code, or unset "
                f"{VARIABLE}."
            )
        return original(names, model_config)

    registry.inspect_model_cls = inspect_model_cls
    registry._vlmprune = True


def config_hook(before: Any) -> type[VerifyAndUpdateConfig]:
    """A hook for vLLM's configs of our architectures, behind the one that there was."""
    if getattr(before, "vlmprune", False):
        return before

    class Hook(VerifyAndUpdateConfig):
        vlmprune = True

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if before is not None:
                before.verify_and_update_model_config(model_config)
            check_model(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            check_settings(vllm_config)

    return Hook


def check_model(model_config: Any) -> None:
    """Arrange for original positions where they are wanted.

    vLLM keeps positions of its own for each request only for models with M-RoPE. A section in the
    outer config says that this is one; the language model, whose config is untouched, is given
    plain positions (`OriginalPositions.forward`).
    """
    policy, config = policies.from_environment(), model_config.hf_config
    try:
        original = policies.positions(policy, config) == "original"
        _check_towers(model_config.architecture, config, policy.pruner)
    except VlmpruneError as error:
        stop(str(error))
    if original and not model_config.uses_mrope:
        config.mrope_section = [1, 1, 1]


def _check_towers(architecture: str, config: Any, method: Pruner | None) -> None:
    """Refuse towers that cannot be followed, and methods that read layers that are not built.

    Raises:
        VlmpruneError: one sentence says why.
    """
    module, name = ARCHITECTURES[architecture].split(":")
    served = getattr(import_module(f"{__package__}.{module}"), name)
    host = served.host(config)
    for medium in served.media:
        medium.check(host)
        absent = medium.absent(host, method)
        if absent:
            raise VlmpruneError(
                f"{method!r} reads encoder layer {max(absent)}, which vLLM does not build as it "
                "comes behind the features; use a method that reads none, such as divprune."
            )


def check_settings(vllm_config: Any) -> None:
    """Refuse settings of vLLM that do not go with pruning."""
    model_config = vllm_config.model_config
    multimodal = model_config.multimodal_config
    policy = policies.from_environment()
    if multimodal is None:
        return
    if policies.KEEP in (multimodal.mm_processor_kwargs or {}):
        stop(f"--mm-processor-kwargs may not hold {policies.KEEP}; set keep in {VARIABLE}.")
    if multimodal.is_multimodal_pruning_enabled():
        stop("--video-pruning-rate prunes videos as well; leave it out, or unset the variable.")
    if multimodal.mm_encoder_tp_mode == "data":
        stop("--mm-encoder-tp-mode data gives each rank other images; use weights.")
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        stop("cudagraph_mm_encoder encodes images past the plugin; leave it out.")
    if vllm_config.compilation_config.compile_mm_encoder:
        stop("compile_mm_encoder hides the vision encoder's attention; leave it out.")
    if policies.positions(policy, model_config.hf_config) != "original":
        return
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        stop(
            "positions='original' are known to the first pipeline stage alone; use "
            "--pipeline-parallel-size 1 or positions=compact."
        )
    if vllm_config.speculative_config is not None:
        stop(
            "positions='original' do not go with speculative decoding; leave it out or use "
            "positions=compact."
        )
