"""Cache layers that hold less than was seen, or hold all and are read in part.

What they hold of a prompt is a `Ragged` of `runtime.attention.ragged_tokens` (cut: keys and values
packed by head) or a `Recalled` of `runtime.attention.recalled`, where attention reads it.
May import `runtime.attention` and what stands below `runtime`.
"""
