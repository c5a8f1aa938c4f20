"""Thresholds of PLPHP for a model.

Vision attention over questions, its quantiles, and the file and the plot of them.
May import `study.measure`, and what stands below `study`.
"""
