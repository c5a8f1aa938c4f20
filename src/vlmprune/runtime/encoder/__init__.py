"""The vision encoder: run once, read, acted in, and what of it is kept for later calls.

May import `runtime.attention`, `attachment`, `geometry` and `scope` there, and what stands below
`runtime`.
"""
