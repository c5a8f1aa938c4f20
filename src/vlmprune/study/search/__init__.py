"""The cheapest setting that stays within a loss.

What may be varied, the search with its journal, and the check on other pictures.
May import `study.evals`, `study.tasks`, `study.measure`, and what stands below them.
"""
