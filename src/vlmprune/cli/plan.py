"""`vlmprune plan`: what a budget costs, or what it buys, with no weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from vlmprune.cli.options import AsJson, Budget, Newlines, Number, Text, keep_of
from vlmprune.cli.printing import console, figures_table, print_json
from vlmprune.costs.units import TERA, UNKNOWN_WORD, digits, flops_unit, mib, percent
from vlmprune.errors import VlmpruneError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from vlmprune.costs.equal_compute import Pair
    from vlmprune.costs.plan import Plan


def plan(
    model: Annotated[
        Text,
        typer.Argument(
            help="An architecture, as llava-1.5-7b, qwen2.5-vl-7b or small, or a folder with a "
            "config.json."
        ),
    ] = None,
    keep: Annotated[
        Text, typer.Option(help="Visual tokens to keep, or a fraction; by default all.")
    ] = None,
    budget: Budget = None,
    crops: Annotated[
        Number, typer.Option(help="Crops of the image; by default 1, or 5 for LLaVA-NeXT.")
    ] = None,
    size: Annotated[
        Text,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Size of the image in pixels; by default one that fills its crops, or has 1,024 "
            "visual tokens where any size goes.",
        ),
    ] = None,
    newlines: Newlines = None,
    compute_budget: Annotated[
        Text,
        typer.Option(
            metavar="TFLOPS|MODEL@TOKENS",
            help="List pairs of language model and visual tokens that cost so much.",
        ),
    ] = None,
    text_tokens: Annotated[
        Number, typer.Option(help="Of --compute-budget: text tokens of a prompt, by default 50.")
    ] = None,
    flops_per_multiply_add: Annotated[
        Number,
        typer.Option(
            metavar="1|2",
            help="What a multiply and an add count as: 2, the default, as in the tables of "
            "VisPruner, FasterVLM and CDPruner; 1 as in those of SparseVLM and CATP.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a budget costs on an architecture, or which ones a budget buys.

    Without weights. With --compute-budget: which language model can have how many visual tokens.
    """
    each = 2 if flops_per_multiply_add is None else flops_per_multiply_add
    if each not in (1, 2):
        raise VlmpruneError(f"--flops-per-multiply-add {each} is no convention; use 1 or 2.")
    if compute_budget is not None:
        others = (keep, budget, crops, size, newlines)
        _equal_compute(model, others, compute_budget, text_tokens, each, as_json)
        return
    from vlmprune.costs.architectures import SHAPES
    from vlmprune.costs.plan import plan as planned

    if model is None:
        raise VlmpruneError(
            f"plan needs an architecture: one of {', '.join(SHAPES)}, or a folder with a "
            "config.json; or --compute-budget, to list several."
        )
    if text_tokens is not None:
        raise VlmpruneError("--text-tokens goes with --compute-budget alone; leave it out.")
    kept = None if keep is None else keep_of(keep)
    costs = planned(
        model,
        kept,
        budget or "crop",  # type: ignore[arg-type]
        crops,
        newlines=newlines or "keep",  # type: ignore[arg-type]
        size=None if size is None else _size(size),
        per_multiply_add=each,
    )
    if as_json:
        print_json(costs.as_dict())
    else:
        console().print(plans_table([costs], each))


def _size(text: str) -> tuple[int, int]:
    """What `--size` says."""
    height, _, width = text.lower().partition("x")
    if not (height.strip().isdecimal() and width.strip().isdecimal()):
        raise VlmpruneError(f"--size {text} is not a height and a width, as in --size 480x640.")
    return int(height), int(width)


def _equal_compute(
    model: str | None,
    others: tuple[object, ...],
    compute_budget: str,
    text_tokens: int | None,
    each: int,
    as_json: bool,
) -> None:
    """`plan --compute-budget`."""
    from vlmprune.costs import equal_compute
    from vlmprune.costs.architectures import DECODERS

    if any(one is not None for one in others):
        raise VlmpruneError(
            "--compute-budget works out the tokens by itself; leave --keep, --budget, --crops, "
            "--size and --newlines out."
        )
    text = 50 if text_tokens is None else text_tokens
    if text < 0:
        raise VlmpruneError(f"--text-tokens {text} is negative; use 0 or more.")
    tflops = equal_compute.budget_of(compute_budget, text, each)
    models = [*DECODERS, *([] if model is None else [model])]
    found = equal_compute.pairs(tflops, text, models, per_multiply_add=each)
    if as_json:
        pairs = [pair.as_dict() for pair in found]
        about = {"tflops": tflops, "flops_per_multiply_add": each, "text_tokens": text}
        print_json(about | {"pairs": pairs})
    else:
        console().print(pairs_table(found, tflops, text, each))


def plans_table(plans: Iterable[Plan], per_multiply_add: int) -> Table:
    """The plans as a Rich table, one row each, "full → pruned" in a cell.

    KV caches are in MiB, which the published tables call MB. FLOPs have three digits, and the
    prefix that suits the largest of them.
    """
    plans = list(plans)
    known = [one for p in plans if not math.isnan(one := p.total_tflops_before)]
    prefix, unit = flops_unit(TERA * max(known, default=1.0))

    def flops(tflops: float) -> str:
        return digits(tflops * TERA / unit)

    result = figures_table("model", ("tokens", "LLM", "vision", "total", "visual KV", "saved"))
    result.caption = (
        f"{prefix}FLOPs ({_convention(per_multiply_add)}) of one image's visual tokens; "
        "visual KV in MiB."
    )
    kept = {p.newline_tokens_after for p in plans if p.newline_tokens_after}
    if kept:
        counts = " or ".join(map(str, sorted(kept)))
        result.caption += (
            f"\n{counts} of the tokens are newlines, which --newlines drop leaves out."
        )
    for p in plans:
        if p.crops_below_keep:
            result.caption += (
                f"\n{p.crops_below_keep} of the {p.crops} crop(s) of {p.model} have fewer tokens "
                f"than --keep {p.keep}, and keep all."
            )
    for p in plans:
        pruned = p.visual_tokens_after != p.visual_tokens_before
        result.add_row(
            p.model,
            _change(str(p.visual_tokens_before), str(p.visual_tokens_after), pruned),
            _change(flops(p.llm_tflops_before), flops(p.llm_tflops_after), pruned),
            flops(p.encoder_tflops),
            _change(flops(p.total_tflops_before), flops(p.total_tflops_after), pruned),
            _change(mib(p.kv_bytes_before), mib(p.kv_bytes_after), pruned),
            percent(p.flops_saving) if pruned and not math.isnan(p.flops_saving) else "",
        )
    return result


def _convention(per_multiply_add: int) -> str:
    return f"{per_multiply_add} per multiply-add"


def _change(before: str, after: str, pruned: bool) -> str:
    return f"{before} → {after}" if pruned and before != UNKNOWN_WORD else before


def pairs_table(
    found: Iterable[Pair], tflops: float, text_tokens: int, per_multiply_add: int
) -> Table:
    """The pairs as a Rich table."""
    result = figures_table("language model", ("layers", "visual tokens", "TFLOPs", "KV cache"))
    result.caption = (
        f"Prefill of {text_tokens} text tokens and the most visual tokens within {tflops:.3g} "
        f"TFLOPs, {_convention(per_multiply_add)}, none where the text alone costs more; the "
        "vision tower comes on top. KV cache in MiB, text included."
    )
    for pair in found:
        unknown = math.isnan(pair.parameters)
        size = digits(pair.parameters / 1e9) + ("" if unknown else " B")
        if pair.visual_tokens is None:
            word = UNKNOWN_WORD if math.isnan(pair.tflops) else "none"
            result.add_row(pair.model, size, word, "", "")
        else:
            figures = digits(pair.tflops), mib(pair.kv_bytes)
            result.add_row(pair.model, size, str(pair.visual_tokens), *figures)
    return result
