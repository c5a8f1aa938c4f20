"""A pruner on a model: what an attachment knows, and how it is given up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import attention, caches, config, contract, decoder, families, release, requests
from vlmprune.report import Report, make
from vlmprune.runtime import shadows
from vlmprune.runtime.cache.gapped_layer import ShortLayer
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.call import run as calls
from vlmprune.runtime.call.state import made
from vlmprune.runtime.decoder import checks, skipping
from vlmprune.runtime.encoder import acting
from vlmprune.runtime.encoder.visions import Vision

if TYPE_CHECKING:
    from vlmprune.pruner.base import Pruner


@dataclass
class Latest:
    """Holds the report of an attachment's last call."""

    report: Report | None = None


class Handle:
    """A pruner on a model.

    Attributes:
        pruner: the method.
        model: the host.
        family: the host's record.
        positions: the position policy in use.
        tokens: for each modality of the family the id of its placeholders.
        cuttable: decoder layers whose cache the method may cut.
        asks: what the method wants to see at the input of decoder layers, by layer.
        skips: decoder layers that visual tokens may skip.
        inside: the position policy of layers that lack tokens.
        latest: holds the report of the last call.
        ledger: what its first calls proved of the contract with Transformers.
    """

    def __init__(self, pruner: Pruner, model: nn.Module) -> None:
        release.check_release()
        model = families.unwrapped(model)
        self.family = families.family_of(model)
        release.check_class(model, self.family.fails)
        self.pruner = pruner
        self.model: Any = model
        self.ledger = contract.Ledger()
        if contract.checks():
            self._check_contract()
        acting.check(model, self.family, pruner)
        self.positions = families.resolve_positions(model, pruner.positions)
        self.cuttable = decoder.full_attention_layers(model) if pruner.cuts else []
        if pruner.cuts:
            self._check_decoder()
        self.asks = checks.asked(model, pruner) if pruner.drops else {}
        self.skips = skipping.skipped(model, pruner) if pruner.routes else ()
        self.inside = checks.resolve_positions(model, pruner)
        if pruner.drops:
            self._check_schedule()
        self.latest = Latest()
        self.tokens = [config.placeholder(self.model.config, m.token) for m in self.family.media]
        self.pad_id = config.pad_id(self.model.config)
        self._leave = pruner.joined(self)
        self.host = shadows.join(model, self)

    @property
    def report(self) -> Report | None:
        """What the last call kept and saved; None before the first."""
        return self.latest.report

    @report.setter
    def report(self, report: Report | None) -> None:
        self.latest.report = report
        made.set(report)

    def _check_contract(self) -> None:
        """Refuse what the release does otherwise, by signatures alone."""
        model, pruner = self.model, self.pruner
        requests.check_model(model, [medium.inputs[0] for medium in self.family.media])
        if self.family.rope is not None:
            requests.deltas_of(model)
        if pruner.shortens and pruner.attends:
            for medium in self.family.media:
                layers = {type(one): one for one in medium.encoder(model, {}).layers}
                for layer in layers.values():
                    attention.check_tappable(layer, "use a method that does not look at attention")
        if pruner.drops or pruner.routes:
            decoder.check_layers(model)
            caches.check_layers(caches.GrowingLayer, ShortLayer)
        if pruner.cuts:
            caches.check_layers(caches.GrowingLayer, RaggedLayer)
            for index in decoder.full_attention_layers(model)[:1]:
                layer = decoder.decoder_layers(model)[index]
                attention.check_tappable(layer, "prune before the language model")
        if pruner.drops or pruner.routes or pruner.cuts:
            caches.check_made(model)

    def _check_decoder(self) -> None:
        here = families.architecture(self.model)
        asked = self.pruner.calibrated_on
        if asked is not None and asked != here:
            raise VlmpruneError(
                f"the thresholds were calibrated on another model ({asked}) than this ({here}); "
                "run `vlmprune calibrate` on it, or give alpha and beta yourself."
            )
        if config.is_capped(self.model.config):
            raise VlmpruneError(
                f"{type(self.model).__name__} has a language model whose attention is capped "
                f"(attn_logit_softcapping), which {self.pruner!r} cannot cut; prune before the "
                "language model."
            )
        if not self.cuttable:
            raise VlmpruneError(
                f"every layer of {type(self.model).__name__} has sliding-window or linear "
                f"attention, which {self.pruner!r} leaves whole; prune before the language model."
            )

    def _check_schedule(self) -> None:
        here, found = families.architecture(self.model), self.pruner.dropper.calibrated_on
        if found is not None and found != here:
            raise VlmpruneError(
                f"the schedule of {self.pruner!r} was found on another model ({found}) than this "
                f"({here}); run `vlmprune search` on this one."
            )

    @cached_property
    def attention(self) -> Any:
        """The attention module of a decoder layer with full attention."""
        layers = decoder.decoder_layers(self.model)
        return attention.attention_of(layers[decoder.full_attention_layers(self.model)[0]])

    def detach(self) -> None:
        """Give the model back exactly as it was. May be called again."""
        shadows.leave(self.model, self)
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    @property
    def architecture(self) -> str:
        """The model's language model, in words."""
        return families.architecture(self.model)

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
        return calls.encode(self, inputs)

    def report_nothing(self) -> None:
        """Report a call that held no image."""
        self.report = make(
            config=self.model.config,
            method=repr(self.pruner),
            positions=self.positions,
            score="",
            layouts=[],
            kept=[],
            roles=[],
            rows=[],
            patches=[],
            dtype=self.model.dtype,
            seconds=0.0,
        )
