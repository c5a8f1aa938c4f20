"""`vlmprune plan`: what a budget costs, or what it buys, with no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vlmprune.cli.options import AsJson, Budget, keep_of
from vlmprune.cli.printing import console, print_json
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from vlmprune.costs.equal_compute import Pair
    from vlmprune.costs.plan import Plan


def plan(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="An architecture, or a folder with a config.json."),
    ] = None,
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Visual tokens to keep, or a fraction; by default all."),
    ] = None,
    budget: Budget = None,
    crops: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Crops of the image; by default 1, or 5 for LLaVA-NeXT."),
    ] = None,
    compute_budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TFLOPS|MODEL@TOKENS",
            help="List pairs of language model and visual tokens that cost so much.",
        ),
    ] = None,
    text_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Of --compute-budget: text tokens of a prompt, by default 50."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a budget costs on an architecture, or which ones a budget buys.

    Without weights. With --compute-budget: which language model can have how many visual tokens.
    """
    if compute_budget is not None:
        _equal_compute(model, (keep, budget, crops), compute_budget, text_tokens, as_json)
        return
    from vlmprune.costs.plan import KNOWN
    from vlmprune.costs.plan import plan as planned

    if model is None:
        raise VlmpruneError(
            f"plan needs an architecture: one of {', '.join(KNOWN)}, or a folder with a "
            "config.json; or --compute-budget, to list several."
        )
    if text_tokens is not None:
        raise VlmpruneError("--text-tokens goes with --compute-budget alone; leave it out.")
    kept = None if keep is None else keep_of(keep)
    costs = planned(model, kept, budget or "crop", crops)  # type: ignore[arg-type]
    if as_json:
        print_json(costs.as_dict())
    else:
        console().print(plans_table([costs]))


def _equal_compute(
    model: str | None,
    others: tuple[object, ...],
    compute_budget: str,
    text_tokens: int | None,
    as_json: bool,
) -> None:
    """`plan --compute-budget`."""
    from vlmprune.costs import equal_compute

    if any(one is not None for one in others):
        raise VlmpruneError(
            "--compute-budget works out the tokens by itself; leave --keep, --budget and --crops "
            "out."
        )
    text = 50 if text_tokens is None else text_tokens
    if text < 0:
        raise VlmpruneError(f"--text-tokens {text} is negative; use 0 or more.")
    tflops = equal_compute.budget_of(compute_budget, text)
    models = [*equal_compute.LADDER, *([] if model is None else [model])]
    found = equal_compute.pairs(tflops, text, models)
    if as_json:
        pairs = [pair.as_dict() for pair in found]
        print_json({"tflops": tflops, "text_tokens": text, "pairs": pairs})
    else:
        console().print(pairs_table(found, tflops, text))


def plans_table(plans: Iterable[Plan]) -> Table:
    """The plans as a Rich table, one row each, "full → pruned" in a cell.

    KV caches are in MiB, which the published tables call MB. FLOPs have three digits.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vlmprune.costs.plan import MIB

    result = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        caption="One image; LLM, vision and total in TFLOPs of visual tokens; KV in MiB.",
    )
    result.add_column("model", overflow="fold")
    for title in ("tokens", "LLM", "vision", "total", "KV", "saved"):
        result.add_column(title, justify="right")
    for p in plans:
        pruned = p.visual_tokens_after != p.visual_tokens_before
        result.add_row(
            p.model,
            _change(str(p.visual_tokens_before), str(p.visual_tokens_after), pruned),
            _change(_digits(p.llm_tflops_before), _digits(p.llm_tflops_after), pruned),
            _digits(p.encoder_tflops),
            _change(_digits(p.total_tflops_before), _digits(p.total_tflops_after), pruned),
            _change(_digits(p.kv_bytes_before / MIB), _digits(p.kv_bytes_after / MIB), pruned),
            f"{p.flops_saving:.0%}" if pruned else "",
        )
    return result


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _change(before: str, after: str, pruned: bool) -> str:
    return f"{before} → {after}" if pruned else before


def pairs_table(found: Iterable[Pair], tflops: float, text_tokens: int) -> Table:
    """The pairs as a Rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vlmprune.costs.plan import MIB

    result = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        caption=(
            f"Prefill of {text_tokens} text tokens and the most visual tokens within "
            f"{tflops:.3g} TFLOPs, none where the text alone costs more; the vision tower comes "
            "on top. KV in MiB."
        ),
    )
    result.add_column("language model", overflow="fold")
    for title in ("layers", "visual tokens", "TFLOPs", "KV"):
        result.add_column(title, justify="right")
    for pair in found:
        size = f"{pair.parameters / 1e9:.3g} B"
        if pair.visual_tokens is None:
            result.add_row(pair.model, size, "none", "", "")
        else:
            held = f"{pair.kv_bytes / MIB:.3g}"
            result.add_row(pair.model, size, str(pair.visual_tokens), f"{pair.tflops:.3g}", held)
    return result
