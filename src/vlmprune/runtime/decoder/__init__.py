"""The language model's layers: rows that leave or skip them, and what their caches are cut to.

May import `runtime.cache`, `runtime.attention`, `runtime.geometry`, `runtime.scope` and what stands
below `runtime`.
"""
