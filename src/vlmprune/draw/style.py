"""How plots and pictures look: one palette, one resolution, axes without a frame, titles left."""

from __future__ import annotations

import io
from typing import Any

from vlmprune.costs.units import percent

# Of Okabe and Ito's palette, which the colour-blind can tell apart; darker where it is too light.
BLUE, ORANGE, GREEN = "#0072B2", "#C04F00", "#00785A"
COLOURS = (BLUE, ORANGE, GREEN, "#A4508B", "#3E9BD6", "#8A6D00", "#1B1F26")
"""For what is compared, in this order."""
GREYS = ("#5F6670", "#8B929C", "#A9AFB8")
"""For what others are compared with."""
GREY = GREYS[0]
INK, GRID = "#1B1F26", "#E4E7EB"
DPI = 150

Colour = tuple[int, int, int]
"""Red, green and blue from 0 to 255, as pictures have them."""
# On pictures, where the palette is brightened; told apart by the colour-blind, too.
LIGHT_ORANGE: Colour = (255, 159, 28)
LIGHT_BLUE: Colour = (86, 196, 255)
LIGHT_GREEN: Colour = (0, 200, 140)
LIGHT_WHITE: Colour = (245, 245, 245)
LIGHT_GREY: Colour = (92, 96, 104)
# The dark card that pictures lie on, its text, and what a model never saw of a picture.
CARD: Colour = (17, 19, 23)
CARD_INK: Colour = (232, 234, 237)
CARD_FAINT: Colour = (154, 160, 168)
CARD_UNSEEN: Colour = (38, 40, 45)


def figure(width: float, height: float, title: str = "") -> Any:
    """An empty figure.

    Args:
        width, height: in inches.
        title: its heading.
    """
    # It takes a second, and only plots need it. Without pyplot no window system is looked for.
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(plain(title), fontsize=12, x=0.01, ha="left")
    return made


def open_axes(axes: Any, labels: int = 10) -> None:
    """Take away the frame above and on the right.

    Args:
        axes: of a figure.
        labels: size of the numbers on them.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=labels)


def grid(axes: Any, which: str = "both") -> None:
    """A light grid behind what is drawn, for the axes "x", "y" or "both"."""
    axes.grid(axis=which, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def in_percent(axis: Any) -> None:
    """Tell the shares on an axis in per cent."""
    axis.set_major_formatter(lambda value, _: percent(value))


def beside(axes: Any, text: str, height: float, colour: str, side: str = "center") -> None:
    """A word on the right of the axes, at a height of theirs, beside the line that it names."""
    axes.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        color=colour,
        fontsize=10,
        va=side,
    )


def plain(text: str) -> str:
    """As it is, since Matplotlib would read what stands between dollars as a formula."""
    return text.replace("$", r"\$")


def png(made: Any, mark: str) -> bytes:
    """A figure as the content of a PNG file, which says what made it."""
    target = io.BytesIO()
    made.savefig(target, format="png", dpi=DPI, metadata={"Software": mark})
    return target.getvalue()
