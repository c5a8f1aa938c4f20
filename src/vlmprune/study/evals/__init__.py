"""Accuracy of a method on a task.

Answers in batches, the store that keeps them, and scores beside the unpruned model's.
May import `study.tasks`, `study.stats`, `study.wording`, and what stands below `study`.
"""
