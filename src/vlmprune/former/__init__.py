"""Public modules under the names they had before the rooms; docs/stability.md lists them.

Each gives the names of one module that stands elsewhere. The package looks here for modules that
it does not have itself, so `vlmprune.budget` is `vlmprune/former/budget.py`.
"""
