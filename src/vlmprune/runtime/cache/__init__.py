"""Cache layers that hold less than was seen.

May import `runtime.attention` and what stands below `runtime`.
"""
