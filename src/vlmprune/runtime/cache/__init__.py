"""Cache layers that hold less than was seen.

What they hold of a cut prompt, keys and values packed by head, is a `Ragged` of
`runtime.attention.ragged_tokens`, where attention reads it.
May import `runtime.attention` and what stands below `runtime`.
"""
