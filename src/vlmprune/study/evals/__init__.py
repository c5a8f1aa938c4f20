"""Accuracy of a method on a task.

May import `study.tasks`, `study.bench` and what stands below `study`.
"""
