"""Methods and budgets over the same questions, and the page that shows them.

Here belongs what puts answers, costs and times side by side; none of them is measured here.
May import `study.evals`, `study.bench` and what stands below them.
"""
