"""G-Search: a retention rate for every decoder layer, found by a search and kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError, meant
from vlmprune.pruner import Pruner
from vlmprune.select import row_rules, schedule
from vlmprune.select.settings import check_choice
from vlmprune.views import Ask, Rows, RowView
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class GSearch(Pruner):
    """Drop visual tokens layer by layer, each layer to its own rate of a schedule.

    Tokens are ranked by the attention that they get in the layer before, and what is dropped is
    gone, so that the kept sets nest from shallow to deep. `vlmprune search` finds the rates, from
    shallow to deep, and writes the file that `from_file` reads.

    Paper: "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token
    Reduction", arXiv 2412.00556; there is no released code that we know of.

    Attributes:
        rates: one retention rate a decoder layer, from layer 0 on: fractions of the visual tokens
            that reached the first layer, never rising; also given as text, as in "1;0.5;0.25".
        positions: "compact" renumbers the tokens that go on, "original" keeps gaps, "auto" takes
            what the model's config recommends, else "original" (our reading).
        calibrated_on: the architecture that the rates were found on, see `from_file`; on any other
            the pruner refuses to be attached. None: not checked.

    That layer 0 ranks nothing is the paper's, as its ranking is unlike that of the others: it is
    whole, and layer 1 is ranked by what it would itself attend to (our reading). So is the last
    prompt token as the one that is asked. Per image max(1, round(rate · tokens)) are kept.

    Where it deviates from the paper: every image has its own budget; the search is `vlmprune
    search`'s own, greedy from shallow to deep as the paper's abstract has it, with Optuna proposing
    each layer's rate.

    Shapes: attention [B, V] → kept [B, V].

    Raises:
        VlmpruneError: a rate is out of range, or the model has another number of layers.
    """

    rates: tuple[float, ...]
    positions: Positions = "auto"
    calibrated_on: str | None = None

    needs: ClassVar[str] = "attention of the last prompt token in every decoder layer, a schedule"
    stage: ClassVar[str] = "inside the language model"
    paper: ClassVar[str] = "arXiv 2412.00556"
    text_agnostic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rates: Any = self.rates
        if isinstance(rates, str):
            try:
                rates = [float(part) for part in rates.split(";")]
            except ValueError as error:
                raise VlmpruneError(
                    f"rates={rates!r} are no numbers parted by semicolons, as in '1;0.5;0.25'."
                ) from error
        if not isinstance(rates, Sequence):
            rates = [rates]
        object.__setattr__(self, "rates", schedule.check_rates(rates))
        check_choice("positions", self.positions, Positions)

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> GSearch:
        """The schedule that `vlmprune search` wrote.

        Args:
            path: its JSON file.
            changes: fields to set otherwise.

        Raises:
            VlmpruneError: the file cannot be read, or holds no schedule.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            near = meant(unknown[0], known)
            raise VlmpruneError(
                f"GSearch has no setting {unknown[0]!r}{near}; it has {', '.join(known)}."
            )
        rates, architecture = schedule.read(path)
        return cls(**({"rates": rates, "calibrated_on": architecture} | changes))

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The layers whose rate is below that of the layer before."""
        schedule.check_depth(self.rates, depth)
        return falling(self.rates)

    def drop(self, layer: int, view: RowView) -> Rows:
        """Keep the layer's share of each image."""
        assert view.attention is not None
        keep = row_rules.share(self.rates[layer], view.before).minimum(view.counts)
        return Rows(row_rules.most_attended(view.attention, view.images, keep))


def falling(rates: Sequence[float]) -> dict[int, Ask]:
    """What to ask where rates fall; nothing is asked of layer 0, so layer 1 speaks for itself."""
    return {
        layer: Ask("own" if layer == 1 else "previous")
        for layer in range(1, len(rates))
        if rates[layer] < rates[layer - 1]
    }
