"""The cheapest setting that stays within a loss.

May import `study.evals`, `study.calibrate` and what stands below them.
"""
