"""What settings of methods may be: positions of kept tokens, and which attention is read."""

from __future__ import annotations

from typing import Literal

# Positions of kept tokens: renumbered, as they were, or as the model's config or its family says.
Positions = Literal["auto", "compact", "original"]
# Which attention scores visual tokens: the family's own, or that of the tower's pooling head.
Score = Literal["auto", "pooling"]
# Which rows of an encoder layer's attention score its tokens: the row of a CLS token that comes
# first or last, or what each token receives of all.
TapRows = Literal["cls", "last", "received"]

# Where the keys and values lie of a cache that is read in part, what stands for the visual tokens
# that a step does not read, and what is noted of each step.
Place = Literal["device", "host"]
Rest = Literal["none", "mean"]
Watch = Literal["", "tokens", "mass"]
