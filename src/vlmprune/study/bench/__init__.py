"""Speed and memory with and without pruning.

May import what stands below `study`.
"""
