"""The page that `compare` writes: one HTML file that needs no network. Knows nothing of models.

Pictures are data URIs, everything is escaped, and a content security policy in the page forbids a
browser to fetch anything. It allows one script, by its hash: the one that moves the slider. That
script is the same on every page; without it, or where it is not run, the page shows all.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.costs.units import percent
from vlmprune.draw import layer_map, overlay
from vlmprune.draw.style import LIGHT_ORANGE
from vlmprune.io.pictures import to_rgb
from vlmprune.study.compare.results import MARK, MOST, SIDE, Comparison, Shown, ShownAnswer
from vlmprune.study.compare.tables import columns, sections
from vlmprune.study.wording import ALL_TOKENS, budget

_QUALITY = 75
_TEMPLATES = Path(__file__).parent / "templates"


def render(result: Comparison, plot: bytes, facts: Mapping[str, Any], command: str = "") -> str:
    """The page.

    Args:
        result: from `compare`.
        plot: the Pareto plot, a PNG.
        facts: versions and device, from `measure.facts`.
        command: what made it, as typed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = _steps(result)
    script = script_text() if len(steps) > 1 and result.shown else ""
    return environment.get_template("compare.html.j2").render(
        mark=MARK,
        script=Markup(script),
        script_hash=Markup(hash_of(script)),
        steps=[budget(keep) for keep in steps],
        first=_first(result, steps),
        result=result,
        plot=data_uri(plot, "png"),
        columns={key: title.replace("\n", " ") for key, title in columns(result).items()},
        sections=list(sections(result)),
        scale=_scale(result),
        groups=_groups(result, steps),
        row_steps=[_step(row.keep, steps) for row in result.rows],
        samples=[_sample(result, steps, shown) for shown in result.shown[:MOST]],
        more=max(0, len(result.shown) - MOST),
        legend=_legend(),
        ramp=[_hex(one) for one in layer_map.RAMP],
        mapped=any(answer.heads for shown in result.shown[:MOST] for answer in shown.answers),
        followed=any(answer.strip for shown in result.shown[:MOST] for answer in shown.answers),
        light=_hex(LIGHT_ORANGE),
        facts=facts,
        command=command,
    )


def script_text() -> str:
    """The script that moves the slider."""
    return (_TEMPLATES / "compare.js").read_text(encoding="utf-8")


def hash_of(script: str) -> str:
    """A script as a content security policy names it."""
    digest = hashlib.sha256(script.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def data_uri(content: bytes, form: str) -> str:
    """A picture as a link that holds it."""
    return f"data:image/{form};base64,{base64.b64encode(content).decode('ascii')}"


def inlined(image: Image.Image) -> str:
    """A picture as a link that holds it, shrunk where it is large."""
    image = to_rgb(image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    # Without subsampling, which would smear the outlines.
    image.save(target, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return data_uri(target.getvalue(), "jpeg")


def _scale(result: Comparison) -> dict[str, Any]:
    """For each row, where its score and interval lie between the lowest and the highest."""
    ends = [end for row in result.rows for end in (row.score.value, *(row.score.ends or ()))]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}"

    def width(a: float, b: float) -> str:
        return f"{100 * (b - a) / span:.2f}"

    out = {}
    for row in result.rows:
        one = row.score
        left, right = one.ends or (one.value, one.value)
        out[row.spec] = {"dot": place(one.value), "left": place(left), "width": width(left, right)}
    return out


def _steps(result: Comparison) -> list[int | float]:
    """The budgets on the slider: those with a number, from few tokens to many."""
    found = {(type(row.keep), row.keep): row.keep for row in result.rows if row.keep is not None}
    every = result.rows[0].visual_tokens
    return sorted(found.values(), key=lambda keep: keep if type(keep) is int else keep * every)


def _step(keep: int | float | None, steps: list[int | float]) -> int | None:
    """A budget's place on the slider; None for what is there at every place."""
    return next((i for i, x in enumerate(steps) if (type(x), x) == (type(keep), keep)), None)


def _first(result: Comparison, steps: list[int | float]) -> int:
    """The place that the slider begins at: the budget that was named first."""
    return next((at for row in result.rows if (at := _step(row.keep, steps)) is not None), 0)


def _groups(result: Comparison, steps: list[int | float]) -> list[dict[str, Any]]:
    """Budgets with the number of configurations of each, in the order of the rows."""
    return [
        {
            "title": title or ALL_TOKENS,
            "count": len(lines),
            "step": _step(lines[0].row.keep, steps),
        }
        for title, lines in sections(result)
    ]


def _sample(result: Comparison, steps: list[int | float], shown: Shown) -> dict[str, Any]:
    return {
        "question": shown.question,
        "truths": shown.truths,
        "images": [inlined(image) for image in shown.images],
        "cells": [
            {
                "name": row.name,
                "keep": "" if row.keep is None else budget(row.keep),
                "step": _step(row.keep, steps),
                "full": row.full,
                "control": row.control,
                "text": answer.text,
                "good": _good(answer),
                "note": _note(answer),
                "drawn": [inlined(image) for image in answer.drawn],
                "kept": answer.kept,
                "before": answer.before,
                "parts": [(k, n, _hex(overlay.COLOURS[k])) for k, n in answer.parts.items()],
                "trouble": answer.trouble,
                "kv": percent(answer.kv_share),
                "map": _map(answer.heads),
                "bars": _bars(answer),
                "read": "" if answer.read_share is None else percent(answer.read_share),
                "strip": [(one.word, list(map(inlined, one.images))) for one in answer.strip],
            }
            for row, answer in zip(result.rows, shown.answers, strict=True)
        ],
    }


def _map(heads: list[list[float]]) -> dict[str, Any] | None:
    """The retention map of layers and KV heads: a small picture, and in words."""
    if not any(heads):
        return None
    means = [percent(sum(one) / len(one)) if one else "no cache" for one in heads]
    count = max(map(len, heads))
    return {
        "src": data_uri(layer_map.picture(heads), "png"),
        "height": f"{min(max(0.8 * count, 1.6), 8):.1f}",
        "heads": count,
        "last": len(heads) - 1,
        "words": ", ".join(f"layer {layer} {mean}" for layer, mean in enumerate(means)),
    }


def _bars(answer: ShownAnswer) -> dict[str, Any] | None:
    """The tokens that reach each layer, as heights in per cent."""
    counts = answer.reached
    if not counts:
        return None
    most = max(answer.before, *counts, 1)
    return {
        "layers": [(layer, n, f"{100 * n / most:.1f}") for layer, n in enumerate(counts)],
        "words": ", ".join(map(str, counts)),
        "last": len(counts) - 1,
    }


def _good(answer: ShownAnswer) -> bool:
    return answer.score >= 0.5 if answer.score is not None else answer.same


def _note(answer: ShownAnswer) -> str:
    if answer.score is not None:
        return "right" if answer.score == 1 else "wrong" if answer.score == 0 else "partly right"
    return "same" if answer.same else "differs"


def _legend() -> list[tuple[str, str]]:
    """Name and colour of all that an overlay shows."""
    return [
        (overlay.WORDS.get(name, name), _hex(colour)) for name, colour in overlay.COLOURS.items()
    ]


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
