"""All that we know of Transformers: its releases, its names, its calls, and what must hold of them.

May import torch, transformers, `views` and `errors`, and nothing else of this package.
"""
