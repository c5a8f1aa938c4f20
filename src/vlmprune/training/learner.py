"""What is trained: the method's own weights, on a model that is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmprune.pruner import Handle, Pruner
from vlmprune.report import Report
from vlmprune.runtime.call import run as calls
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.training.rows import IGNORE
from vlmprune.training.states import States


class Learner(nn.Module):
    """A frozen model under a method whose weights are trained; the loss of a batch.

    Entries bring several rows each: one pass of the vision encoder serves them all where the
    method does not look at the question, or where the encoder's states are kept.

    Args:
        model: the host, to be frozen.
        pruner: the method, with a `module`.
        names: of the module's parameters that are trained; None for all.
        states: the encoder's states on disk; None to run it.
        peft: the model as PEFT's `get_peft_model` returned it; None without a LoRA.
        tunes: whether its LoRA is trained along.
        weigh: "token", every token of an answer counts alike; "answer", every answer does.
    """

    # Our keyword arguments are pixels; the Trainer would add its own.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: Any,
        pruner: Any,
        names: Sequence[str] | None = None,
        states: States | None = None,
        peft: Any = None,
        tunes: bool = True,
        weigh: str = "token",
    ) -> None:
        super().__init__()
        self.host = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(tunes and peft is not None and "lora_" in name)
        self.learned: nn.Module = pruner.module
        for name, parameter in self.learned.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        self.pruner: Pruner = pruner
        # In a list, so that it is no part of this module beside the host that it holds.
        self._peft = [peft]
        self.states = states
        self.weigh = weigh
        self.handle: Handle | None = None
        # Visual tokens of a crop that the last batch left, once there was one.
        self.tokens: int | None = None

    @property
    def peft(self) -> Any:
        """The model as PEFT wraps it; None without a LoRA."""
        return self._peft[0]

    @contextmanager
    def attached(self) -> Iterator[Learner]:
        """The method on its model for as long as training lasts."""
        with self._weighing(), self._serving(), self.pruner(self.host) as self.handle:
            yield self
        self.handle = None

    @contextmanager
    def _weighing(self) -> Iterator[None]:
        """Our loss in place of the model's own, where it is asked for."""
        if self.weigh == "token":
            yield
            return
        name = "_loss_function"
        before = {name: vars(self.host)[name]} if name in vars(self.host) else {}
        self.host.loss_function = by_answer
        try:
            yield
        finally:
            vars(self.host).pop(name, None)
            vars(self.host).update(before)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        if self.states is None:
            yield
            return
        with self.states.serving():
            yield

    def train(self, mode: bool = True) -> Learner:
        """Only the method: what is frozen stays in eval mode."""
        super().train(mode)
        self.host.eval()
        return self

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {k: v for k, v in self.learned.named_parameters() if v.requires_grad}

    def lora(self) -> dict[str, Tensor]:
        """The parameters of the LoRA, by name."""
        return {k: v for k, v in self.host.named_parameters() if v.requires_grad}

    # Checkpoints hold what the method has, not the host.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The module's state and the LoRA's."""
        both = {f"learned.{k}": v for k, v in self.learned.state_dict().items()}
        both |= {f"lora.{k}": v.detach() for k, v in self.lora().items()}
        return {k: v.contiguous().clone() for k, v in both.items()}

    def load_state_dict(  # type: ignore[override]
        self, state: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Take what `state_dict` gave."""
        parts: dict[str, dict[str, Any]] = {"learned": {}, "lora": {}}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = value
        with torch.no_grad():
            for name, parameter in self.lora().items():
                parameter.copy_(parts["lora"][name])
        return self.learned.load_state_dict(parts["learned"])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        rows: Tensor,
        pictures: Tensor,
        places: Tensor | None = None,
        **pixels: Tensor,
    ) -> dict[str, Tensor]:
        """The mean loss of the answers' tokens, or of the answers.

        Args:
            input_ids: [B, L], placeholders as for the unpruned model.
            attention_mask: [B, L].
            labels: [B, L], -100 but for answers.
            rows: [E] rows of each entry.
            pictures: [E] pictures of each entry.
            places: [P] of all pictures, where the encoder's states are kept.
            pixels: what the processor made of all pictures, one row each.
        """
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        counts, each = rows.tolist(), pictures.tolist()
        starts = [sum(each[:i]) for i in range(len(each))]
        of_rows = [
            start + picture
            for start, amount, times in zip(starts, each, counts, strict=True)
            for _ in range(times)
            for picture in range(amount)
        ]
        if self.pruner.shortens and self.pruner.text_agnostic:
            given: dict[str, Any] = {"vision": self._vision(text, counts, places, pixels)}
            vision = given["vision"]
            given["vision"] = replace(vision, items=tuple(vision.items[i] for i in of_rows))
            self._tell(None)
        else:
            order = torch.tensor(of_rows, device=input_ids.device)
            given = {k: _taken(v, order) for k, v in pixels.items()}
            self._tell(places, order)
        with _attention(input_ids.device):
            out = self.host(**text, **given, labels=labels, use_cache=False)
        if self.handle is not None and self.training:
            self.tokens = left(self.handle.report)
        return {"loss": out.loss}

    def _vision(
        self,
        text: dict[str, Tensor],
        counts: list[int],
        places: Tensor | None,
        pixels: dict[str, Tensor],
    ) -> Vision:
        """All pictures, encoded once, with gradients."""
        first = [sum(counts[:i]) for i in range(len(counts))]
        self._tell(places)
        assert self.handle is not None
        return calls.encoded(
            self.handle.attachment, {k: v[first] for k, v in text.items()} | pixels
        )

    def _tell(self, places: Tensor | None, order: Tensor | None = None) -> None:
        """Of which pictures the kept states are wanted next."""
        if self.states is not None:
            both = places is not None and order is not None
            self.states.now = places[order] if both else places  # type: ignore[index]


def by_answer(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
    """Mean over rows of the mean loss of their tokens, in place of a model's own loss.

    Args:
        logits: [B, L, V].
        labels: [B, L], -100 where there is no loss; a row has some.
    """
    wanted = labels[:, 1:].to(logits.device)
    scores = logits[:, :-1].float().transpose(1, 2)
    each = nn.functional.cross_entropy(scores, wanted, ignore_index=IGNORE, reduction="none")
    return (each.sum(dim=1) / (wanted != IGNORE).sum(dim=1).clamp(min=1)).mean()


def _attention(device: torch.device) -> Any:
    """On a CPU the plain form of attention, whose backward pass is faster for few queries."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _taken(values: Tensor, order: Tensor) -> Tensor:
    """Rows in an order; a stand-in whose rows are all the same in memory is not copied."""
    if values.stride(0) == 0:
        return values[:1].expand(len(order), *values.shape[1:])
    return values[order]


def left(report: Report | None) -> int | None:
    """Visual tokens that a method leaves of a crop; None where crops are left different numbers."""
    if report is None:
        return None
    crops = sum(one.crops for one in report.layouts)
    tokens = report.visual_tokens_after - report.newline_tokens
    return tokens // crops if crops and tokens % crops == 0 else None
