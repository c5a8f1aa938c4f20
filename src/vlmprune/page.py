"""The page that `compare` writes: one HTML file that needs no network. Knows nothing of models.

Pictures are data URIs, everything is escaped, and a content security policy in the page forbids a
browser to fetch anything.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune import overlay
from vlmprune.compared import ALL_TOKENS, MARK, Answer, Result, budget, columns, sections
from vlmprune.errors import VlmpruneError

# Pixels of a picture's long side, about twice what the page shows.
SIDE = 448
MOST = 12
"""Questions that are drawn on a page, so that it stays small."""
_QUALITY = 85
# Bytes at a file's beginning in which the mark is looked for.
_HEAD = 4096


def render(result: Result, plot: bytes, facts: Mapping[str, Any], command: str = "") -> str:
    """The page.

    Args:
        result: from `compare`.
        plot: the Pareto plot, a PNG.
        facts: versions and device, from `measure.facts`.
        command: what made it, as typed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("compare.html.j2").render(
        mark=MARK,
        result=result,
        plot=data_uri(plot, "png"),
        columns={key: title.replace("\n", " ") for key, title in columns(result).items()},
        sections=list(sections(result)),
        scale=_scale(result),
        groups=_groups(result),
        samples=[_sample(result, number) for number in range(len(result.shown))],
        legend=_legend(),
        facts=facts,
        command=command,
    )


def data_uri(content: bytes, form: str) -> str:
    """A picture as a link that holds it."""
    return f"data:image/{form};base64,{base64.b64encode(content).decode('ascii')}"


def inlined(image: Image.Image) -> str:
    """A picture as a link that holds it, shrunk where it is large."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    # Without subsampling, which would smear the outlines.
    image.save(target, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return data_uri(target.getvalue(), "jpeg")


def _scale(result: Result) -> dict[str, Any]:
    """For each row, where its score and interval lie between the lowest and the highest."""
    ends = [
        end
        for row in result.rows
        for end in (row.score.value, row.score.low, row.score.high)
        if end is not None
    ]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}"

    def width(a: float, b: float) -> str:
        return f"{100 * (b - a) / span:.2f}"

    out = {}
    for row in result.rows:
        one = row.score
        left = one.value if one.low is None else one.low
        right = one.value if one.high is None else one.high
        out[row.spec] = {"dot": place(one.value), "left": place(left), "width": width(left, right)}
    return out


def _groups(result: Result) -> list[tuple[str, int]]:
    """Budgets with the number of configurations of each, in the order of the rows."""
    found: list[tuple[str, int]] = []
    for title, lines in sections(result):
        found.append((title or ALL_TOKENS, len(lines)))
    return found


def _sample(result: Result, number: int) -> dict[str, Any]:
    shown = result.shown[number]
    return {
        "question": shown.question,
        "truths": shown.truths,
        "images": [inlined(image) for image in shown.images],
        "cells": [
            {
                "name": row.name,
                "keep": "" if row.keep is None else budget(row.keep),
                "full": row.full,
                "control": row.control,
                "text": answer.text,
                "good": _good(result, answer),
                "note": _note(answer),
                "drawn": [inlined(image) for image in answer.drawn],
                "kept": answer.kept,
                "before": answer.before,
                "trouble": answer.trouble,
                "kv": f"{100 * answer.kv_share:.0f} %",
            }
            for row, answer in zip(result.rows, shown.answers, strict=True)
        ],
    }


def _good(result: Result, answer: Answer) -> bool:
    return answer.score >= 0.5 if answer.score is not None else answer.same


def _note(answer: Answer) -> str:
    if answer.score is not None:
        return "right" if answer.score == 1 else "wrong" if answer.score == 0 else "partly right"
    return "same" if answer.same else "differs"


def _legend() -> list[tuple[str, str]]:
    """Name and colour of all that an overlay shows."""
    return [
        (overlay.WORDS.get(name, name), "#{:02x}{:02x}{:02x}".format(*colour))
        for name, colour in overlay.COLOURS.items()
    ]


def check_free(path: Path) -> Path:
    """Refuse a file that could not be written, or that `compare` did not write; makes the folder.

    Raises:
        VlmpruneError: it is one of these.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise VlmpruneError(f"{str(path)!r} is a folder; give the name of a file in it.")
        if path.exists():
            with path.open("rb") as file:
                head = file.read(_HEAD)
            if MARK.encode() not in head:
                raise VlmpruneError(
                    f"{str(path)!r} is there already and not of `{MARK}`; give another name, or "
                    "move it away."
                )
    except OSError as error:
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error
    if not os.access(path.parent, os.W_OK):
        raise VlmpruneError(f"{str(path)!r} cannot be written (Permission denied).")
    return path


def write(path: Path, content: bytes | str) -> None:
    """Write a file at once, so that nobody finds half of it.

    Raises:
        VlmpruneError: the disk refuses.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    name = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            name = Path(file.name)
            file.write(data)
        # As any new file has them; a temporary one is the owner's alone.
        mask = os.umask(0)
        os.umask(mask)
        name.chmod(0o666 & ~mask)
        name.replace(path)
    except OSError as error:
        if name is not None:
            name.unlink(missing_ok=True)
        raise VlmpruneError(f"{str(path)!r} cannot be written ({error.strerror}).") from error
