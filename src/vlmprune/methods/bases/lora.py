"""A LoRA of the language model that a method was trained with: put on by hooks, taken off again.

PEFT trains it; to run it, PEFT is not needed. Named linear layers get `B(A(x)) · scaling` added to
what they return, and only in calls that the attachment acts on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.decoder import recomputes
from vlmprune.method import Attached
from vlmprune.runtime.scope import active

# How PEFT's names begin, and how they end.
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass
class Lora:
    """Low-rank additions to linear layers.

    Attributes:
        rank: of the additions.
        alpha: as PEFT has it.
        rslora: whether alpha is divided by the root of the rank instead of by the rank.
        tensors: by PEFT's names, A [rank, in] and B [out, rank] of each layer, float32.
    """

    rank: int
    alpha: float
    rslora: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Factor of the additions."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        return {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora}

    @property
    def targets(self) -> list[str]:
        """The linear layers, as the host names them."""
        return sorted(n[len(PREFIX) : -len(A)] for n in self.tensors if n.endswith(A))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Lora:
        """Without its tensors yet."""
        return cls(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))

    @classmethod
    def of_peft(cls, peft_model: Any, adapter: str = "default") -> Lora:
        """What PEFT trained.

        Raises:
            VlmpruneError: it is no plain LoRA of linear layers.
        """
        from peft import get_peft_model_state_dict

        config = peft_model.peft_config[adapter]
        settings = config.to_dict()
        plain = {
            "bias": "none",
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "fan_in_fan_out": False,
        }
        for name, value in plain.items():
            given = settings.get(name, value)
            if given != value and given:
                raise VlmpruneError(
                    f"the LoRA has {name}={given!r}, which a hook cannot do; train it with "
                    f"{name}={value!r}."
                )
        found = get_peft_model_state_dict(peft_model, adapter_name=adapter)
        for name in found:
            if not (name.startswith(PREFIX) and name.endswith((A, B))):
                raise VlmpruneError(
                    f"the LoRA holds {name!r}, which is no A or B of a linear layer; train linear "
                    "layers alone."
                )
        tensors = {name: tensor.detach().float().clone() for name, tensor in found.items()}
        return cls(config.r, config.lora_alpha, bool(config.use_rslora), tensors)

    def put_on(self, attachment: Attached) -> Callable[[], None]:
        """Let it act in an attachment's calls; returns what takes it off.

        Raises:
            VlmpruneError: the model lacks one of its layers, or has it in another size.
        """
        found: list[tuple[nn.Module, Tensor, Tensor]] = []
        for name in self.targets:
            down, up = (self.tensors[f"{PREFIX}{name}{end}"] for end in (A, B))
            try:
                layer: Any = attachment.model.get_submodule(name)
                fits = (layer.in_features, layer.out_features) == (down.shape[1], up.shape[0])
            except AttributeError:
                fits = False
            if not fits:
                raise VlmpruneError(
                    f"the LoRA of {attachment.method!r} is for a linear layer {name!r} of "
                    f"{down.shape[1]} to {up.shape[0]} features, which "
                    f"{type(attachment.model).__name__} lacks; use the model that it was trained "
                    "with."
                )
            found.append((layer, down, up))
        hooks = [
            layer.register_forward_hook(_added(attachment, down, up, self.scaling))
            for layer, down, up in found
        ]

        def take_off() -> None:
            for hook in hooks:
                hook.remove()

        return take_off


def _added(attachment: Attached, down: Tensor, up: Tensor, scaling: float) -> Callable[..., Any]:
    """The hook of one linear layer."""
    placed = [down, up]

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        scope = active.get()
        if scope is None or scope.attachment is not attachment:
            return None
        if recomputes(attachment.model):
            raise VlmpruneError(
                "a LoRA that is put on by hooks is not there when activations are recomputed; "
                "train it by PEFT, or turn gradient checkpointing off."
            )
        if placed[0].device != output.device:
            placed[:] = [one.to(output.device) for one in placed]
        down, up = placed
        low = nn.functional.linear(args[0].to(down.dtype), down)
        return (output + nn.functional.linear(low, up) * scaling).to(output.dtype)

    return hook
