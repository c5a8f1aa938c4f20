"""Evaluation harnesses: lmms-eval by its plugin entry point, VLMEvalKit by a launcher.

Nothing here is imported by the rest of the package, and no harness is needed to install it.
"""
