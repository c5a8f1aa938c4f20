"""What `scripts/mutate.py` is made of: trees, who reaches a line, mutants, and one trial of each.

Nothing here imports the package that is mutated: each test run is a fork of a process that has
imported what the tests need besides it.
"""
