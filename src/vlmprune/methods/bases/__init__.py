"""What several methods are made of: bases that keep a budget, and the parts of those that learn.

May import `embedded`, `pruner` and what stands below.
"""
