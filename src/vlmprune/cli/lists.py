"""`plan`, `methods` and `models`: what there is and what it costs, with no weights."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vlmprune.cli.options import AsJson, Budget, keep_of
from vlmprune.cli.printing import console, print_json
from vlmprune.errors import VlmpruneError


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
    from vlmprune.costs import plan as planning

    if model is None:
        raise VlmpruneError(
            f"plan needs an architecture: one of {', '.join(planning.KNOWN)}, or a folder with a "
            "config.json; or --compute-budget, to list several."
        )
    if text_tokens is not None:
        raise VlmpruneError("--text-tokens goes with --compute-budget alone; leave it out.")
    kept = None if keep is None else keep_of(keep)
    costs = planning.plan(model, kept, budget or "crop", crops)  # type: ignore[arg-type]
    if as_json:
        print_json(costs.as_dict())
    else:
        console().print(planning.table([costs]))


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
        console().print(equal_compute.table(found, tflops, text))


def methods(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="NAME", help="Methods to be told about; by default all."),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="One line a method.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods: stage, needs, settings, paper, and where ours deviates.

    A result is reusable where what is kept of an image serves all questions about it.
    """
    from vlmprune import catalog

    found = catalog.methods(names or ())
    if as_json:
        print_json(found)
        return
    if brief or not names:
        console().print(catalog.overview(found))
        console().print()
    for one in () if brief else found["methods"]:
        console().print(catalog.method_table(one))
    console().print(catalog.HINT, style="dim", markup=False)


def models(as_json: AsJson = False) -> None:
    """List the supported models."""
    from vlmprune import catalog

    found = catalog.models()
    if as_json:
        print_json(found)
    else:
        console().print(catalog.models_table(found))
