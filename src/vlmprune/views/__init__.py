"""What a method sees and returns, and where visual tokens lie: plain data, no class of any host.

Here belong bundles of tensors that several rooms hand on. May import torch and `select.budget`, and
nothing else of this package.
"""

from vlmprune.views.decoder import (
    Ask,
    FrameView,
    LayerView,
    Probes,
    Retention,
    Routed,
    Rows,
    RowView,
)
from vlmprune.views.encoder import EncoderView, Inside, Merge, Reads, Selection
from vlmprune.views.layout import Layout

__all__ = [
    "Ask",
    "EncoderView",
    "FrameView",
    "Inside",
    "LayerView",
    "Layout",
    "Merge",
    "Probes",
    "Reads",
    "Retention",
    "Routed",
    "RowView",
    "Rows",
    "Selection",
]
