"""The handle of an attachment: what users hold while a pruner is on a model."""

from __future__ import annotations

import warnings
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.report import Report
from vlmprune.runtime import shadows
from vlmprune.runtime.attach import attachment_of
from vlmprune.runtime.attachment import Logits
from vlmprune.runtime.call import run
from vlmprune.runtime.encoder.visions import Vision
from vlmprune.select.settings import check_choice

M = TypeVar("M", bound=Method)

# What a handle itself told up to 0.2, and where it stands now.
_FORMER = {
    "tokens": "tokens",
    "cuttable": "cuttable",
    "asks": "asks",
    "skips": "skips",
    "inside": "decoder_positions",
    "latest": "latest",
    "ledger": "ledger",
}


class Handle(Generic[M]):
    """A pruner on a model.

    Attributes:
        pruner: the method, or the chain.
        model: the host.
        family: the host's record.
        positions: the position policy of what is kept before the language model.
        logits: the columns at which a plain forward gives logits; None where nobody said.
        architecture: the model's language model, in words.
        report: what the last call of this thread kept and saved, or, where it made none, the last
            of any; None before the first.
        attachment: all that is known of it, as what acts in the model's calls is given it.
    """

    def __init__(
        self, pruner: M, model: nn.Module, block: bool = False, logits: Logits | None = None
    ) -> None:
        if logits is not None:
            check_choice("logits", logits, Logits)
        self._pruner = pruner
        self.attachment = attachment_of(pruner, model)
        self.attachment.logits = logits
        self._leave = pruner.joined(self.attachment)
        self.attachment.leave, self.attachment.block = self.detach, block
        functions = shadows.Functions(run.generate, run.forward, run.features, run.rules)
        try:
            shadows.join(self.attachment, functions)
        except BaseException:
            # What the method put on the model goes as well.
            self.detach()
            raise

    def __getattr__(self, name: str) -> Any:
        if name not in _FORMER:
            raise AttributeError(f"'Handle' object has no attribute {name!r}")
        new = f"attachment.{_FORMER[name]}"
        warnings.warn(f"handle.{name} is handle.{new} now", DeprecationWarning, stacklevel=2)
        return getattr(self.attachment, _FORMER[name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pruner!r} on {type(self.model).__name__})"

    @property
    def pruner(self) -> M:
        """The method, or the chain."""
        return self._pruner

    @property
    def model(self) -> Any:
        """The host."""
        return self.attachment.model

    @property
    def family(self) -> Family:
        """The host's record."""
        return self.attachment.family

    @property
    def positions(self) -> Literal["compact", "original"]:
        """The position policy in use."""
        return self.attachment.positions

    @property
    def logits(self) -> Logits | None:
        """The columns at which a plain forward gives logits; None where nobody said."""
        return self.attachment.logits

    @property
    def architecture(self) -> str:
        """The model's language model, in words."""
        return self.attachment.architecture

    @property
    def report(self) -> Report | None:
        """What the last call kept and saved; None before the first."""
        return self.attachment.report

    def detach(self) -> None:
        """Give the model back exactly as it was. May be called again."""
        shadows.leave(self.attachment)
        # Without a circle all that was loaded for the attachment goes with the handle.
        self.attachment.settle()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    @torch.no_grad()
    def encode(self, **inputs: Any) -> Vision:
        """Encode and prune the images and videos of a request, to be asked about later.

        Give the result to later calls as `model.generate(**inputs, vision=...)` or
        `model(**inputs, vision=...)`, whose pixels are then not looked at and may be left out.
        Only for methods that do not look at the question.

        Args:
            inputs: all that the model's own processor returns.

        Raises:
            VlmpruneError: the method looks at the question, or the request holds no image.
        """
        return run.encoded(self.attachment, inputs)
