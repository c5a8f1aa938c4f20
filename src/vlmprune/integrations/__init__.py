"""Serving in vLLM and evaluation harnesses: by plugin entry points, VLMEvalKit by a launcher.

Nothing here is imported by the rest of the package, and none of them is needed to install it.
May import `io`, `spec` and what stands below, and the package that it serves.
"""
