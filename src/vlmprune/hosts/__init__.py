"""What we know of Transformers itself: its releases, and what they call things.

May import torch, transformers and `errors`, and nothing else of this package.
"""
