"""Methods and budgets over the same questions, and the page that shows them.

May import `study.evals`, `study.bench` and what stands below them.
"""
