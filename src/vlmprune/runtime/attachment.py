"""An attachment's data: one plain object that what acts is given. It knows nothing of what acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from vlmprune import costs
from vlmprune.hosts import attention, contract, decoder, families, layer_sizes
from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.report import Report, make
from vlmprune.runtime.scope import note_report, reported
from vlmprune.views import Ask

# At which columns a plain forward gives logits: at those that are left, or at the user's own.
Logits = Literal["short", "full"]


def _stay() -> None:
    """Gives nothing back."""


@dataclass(eq=False)
class Latest:
    """Holds the report of an attachment's last call."""

    report: Report | None = None


@dataclass(eq=False, repr=False)
class Attachment:
    """A method on a model.

    Attributes:
        method: the method, or a chain of several.
        model: the host.
        family: the host's record.
        positions: the position policy of what is kept before the language model.
        tokens: for each modality of the family the id of its placeholders.
        pad_id: the id of padding.
        cuttable: decoder layers whose cache the method may cut.
        asks: what the method wants to see at the input of decoder layers, by layer.
        skips: decoder layers that visual tokens may skip.
        decoder_positions: the position policy of decoder layers that lack tokens.
        originals: the host's own methods by name, as they were before the first attachment.
        latest: holds the report of the last call.
        ledger: what its first calls proved of the contract with Transformers.
        leave: gives the model back.
        block: whether it is of a `with` block, which is for the context that opened it.
        among: the attachments to the same model that its context had when it was made.
        logits: the columns of a plain forward's logits; None where nobody said, which is "short"
            with a warning.
        told: whether that warning was given.
    """

    method: Method
    model: Any
    family: Family
    positions: Literal["compact", "original"]
    tokens: Sequence[int]
    pad_id: int
    cuttable: Sequence[int] = ()
    asks: Mapping[int, Ask] = field(default_factory=dict)
    skips: tuple[int, ...] = ()
    decoder_positions: Literal["compact", "original"] = "original"
    originals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    latest: Latest = field(default_factory=Latest)
    ledger: contract.Ledger = field(default_factory=contract.Ledger)
    leave: Callable[[], None] = _stay
    block: bool = False
    among: tuple[Any, ...] = ()
    logits: Logits | None = None
    told: bool = False

    @property
    def as_it_comes(self) -> bool:
        """Whether a request goes to the host as it came, for placeholders alone are known."""
        return self.family.counted and not self.method.shortens

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r} on {type(self.model).__name__})"

    def settle(self) -> None:
        """Have nothing to give back any more, and so no circle with what would."""
        self.leave = _stay

    @property
    def report(self) -> Report | None:
        """What the last call kept and saved: this thread's, or else any; None before the first."""
        return reported(self.latest) or self.latest.report

    @report.setter
    def report(self, report: Report) -> None:
        self.latest.report = report
        note_report(self.latest, report)

    @cached_property
    def attentions(self) -> Mapping[int, nn.Module]:
        """The attention modules of the decoder layers with a full cache of their own, by layer."""
        layers = decoder.decoder_layers(self.model)
        full = decoder.full_attention_layers(self.model)
        return {index: attention.attention_of(layers[index]) for index in full}

    @cached_property
    def borrowing(self) -> Mapping[nn.Module, int]:
        """Those of layers that attend to an earlier one's keys and values, with that one."""
        layers = decoder.decoder_layers(self.model)
        some = decoder.borrowing_layers(self.model).items()
        return {attention.attention_of(layers[index]): lender for index, lender in some}

    @cached_property
    def decoder_sizes(self) -> costs.Layers | None:
        """The sizes of the decoder's layers, which no call changes; None where they are unknown."""
        return layer_sizes.layers(self.model.config)

    @property
    def architecture(self) -> str:
        """The model's language model, in words."""
        return families.architecture(self.model)

    def report_nothing(self) -> None:
        """Report a call that held no image."""
        self.report = make(
            config=self.model.config,
            method=repr(self.method),
            positions=self.positions,
            score="",
            layouts=[],
            kept=[],
            roles=[],
            rows=[],
            patches=[],
            dtype=self.model.dtype,
            seconds=0.0,
            layers=self.decoder_sizes,
        )
