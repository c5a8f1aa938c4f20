"""Models that several processes hold together: by heads, by shards of weights, or each a copy.

Under tensor parallelism a process has some heads of an attention, so what is read of it is a part,
and `Sharing` makes the whole of the parts. FSDP gives a module a class of its own, and its weights
to it only while it runs. DDP wraps a model that is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from vlmprune.errors import VlmpruneError

T = TypeVar("T")

# What configs of language models and towers call the number of query heads.
_HEADS = ("num_attention_heads", "num_heads")
# Transformers' mark of a quantised layer under tensor parallelism, whose weights are plain tensors.
_PLAIN_SHARDS = "_hf_quantized_needs_local_tp"
# Where the classes stand that torch puts in front of a module's own.
_IN_FRONT = "torch.distributed"
# The mesh of tensor parallelism, as Transformers names it.
_TP = ("tp",)
_DDP = "DistributedDataParallel"
# A name that no module has.
_RUN = "_vlmprune_run"


@dataclass(frozen=True)
class Sharing:
    """The processes that have some heads each of one attention, in the order of heads.

    Every process must ask for the same, in the same order.

    Attributes:
        group: the processes; None where this one has all heads.
        ranks: their number.
        rank: this one's place among them.
    """

    group: Any = None
    ranks: int = 1
    rank: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        """Itself: a group of processes cannot be copied."""
        return self

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the processes, equal on all."""
        if self.group is None:
            return values
        values = values.clone()
        distributed.all_reduce(values, group=self.group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all heads, from one over each process's."""
        return values if self.group is None else self.summed(values) / self.ranks

    def joined(self, values: Tensor) -> Tensor:
        """[B, H, ...] of all heads, from [B, H / ranks, ...] of each process's."""
        if self.group is None:
            return values
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        distributed.all_gather(parts, values, group=self.group)
        return torch.cat(parts, dim=1)

    def own(self, values: Tensor) -> Tensor:
        """[B, H / ranks, ...] of this process's heads, from [B, H, ...] of all."""
        return values if self.group is None else values.chunk(self.ranks, dim=1)[self.rank]


WHOLE = Sharing()


def sharing(module: nn.Module, heads: int) -> Sharing:
    """Who else has heads of an attention module, asked while it runs.

    Args:
        module: the attention module.
        heads: query heads that it attends with in this process.

    Raises:
        VlmpruneError: it has some heads only, and nothing tells who has the others.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return WHOLE
    held = _shards(module)
    plain = any(getattr(one, _PLAIN_SHARDS, False) for one in module.modules())
    if not held and not plain:
        return WHOLE
    said = getattr(module, "config", None)
    total = next((n for n in (getattr(said, name, None) for name in _HEADS) if n), None)
    if total == heads:
        # Its projections are gathered.
        return WHOLE
    if len(held) == 1:
        mesh, number = held.pop()
        ranks = mesh.size(number)
        if total == heads * ranks:
            return Sharing(mesh.get_group(number), ranks, mesh.get_local_rank(number))
    raise VlmpruneError(
        f"{type(module).__name__} has {heads} of {total or 'an unknown number of'} heads in this "
        "process, and its weights do not tell which processes have the others, so its attention "
        "cannot be read; use a method that does not look at attention, or load the model without "
        "tensor parallelism."
    )


def _shards(module: nn.Module) -> set[tuple[Any, int]]:
    """The meshes, and the dimension of each, over which a module's weights are cut."""
    # Not at the top: without tensor parallelism nobody has imported it yet, which takes long.
    from torch.distributed.tensor import DTensor

    return {
        (weight.device_mesh, number)
        for weight in module.parameters()
        if isinstance(weight, DTensor)
        for number, placement in enumerate(weight.placements)
        if not placement.is_replicate() and weight.device_mesh.size(number) > 1
    }


def class_of(module: Any) -> type:
    """A module's class as it was before FSDP put one in front of it."""
    mro = type(module).__mro__
    return next((cls for cls in mro if not cls.__module__.startswith(_IN_FRONT)), mro[0])


def inner(model: Any) -> Any:
    """The model inside DDP; any other as it is."""
    return model.module if type(model).__name__ == _DDP else model


def gathered(model: Any, call: Callable[[], T]) -> T:
    """Run what uses a model's weights and may be outside of its forward, to which FSDP gives them.

    Args:
        model: the host.
        call: what is run, as FSDP runs the forward if it must.
    """
    if class_of(model) is type(model) or not _cut(model):
        return call()
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(model, _RUN, call)
    try:
        register_fsdp_forward_method(model, _RUN)
        found: T = getattr(model, _RUN)()
    finally:
        vars(model).pop(_RUN, None)
    return found


def _cut(module: nn.Module) -> bool:
    """Whether FSDP holds a part only of the weights that a module itself has to gather."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for weight in module.parameters(recurse=False):
        # What it gathered stays cut by tensor parallelism, if there is such.
        if isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names != _TP:
            return True
    # Others that it was put in front of gather their own.
    return any(_cut(one) for one in module.children() if not isinstance(one, FSDPModule))
