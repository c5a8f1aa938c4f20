"""Speed and memory with and without pruning.

The ways in turns, their floors, and models in known shapes with random weights.
May import `study.measure`, `study.wording`, and what stands below `study`.
"""
