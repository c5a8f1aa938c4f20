"""The handle of an attachment: what users hold while a pruner is on a model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.report import Report
from vlmprune.runtime import shadows
from vlmprune.runtime.attach import attachment_of
from vlmprune.runtime.attachment import nothing
from vlmprune.runtime.call import run
from vlmprune.runtime.encoder.visions import Vision


class Handle:
    """A pruner on a model.

    Attributes:
        attachment: the attachment's data.
    """

    def __init__(self, pruner: Method, model: nn.Module) -> None:
        self.attachment = attachment_of(pruner, model)
        self._leave = pruner.joined(self.attachment)
        self.attachment.leave = self.detach
        shadows.join(self.attachment, shadows.Functions(run.generate, run.forward, run.features))

    @property
    def pruner(self) -> Method:
        """The method."""
        return self.attachment.method

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
        self.attachment.leave = nothing
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
        return run.encode(self.attachment, inputs)
