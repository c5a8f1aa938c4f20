"""Thresholds of PLPHP for a model.

May import what stands below `study`.
"""
