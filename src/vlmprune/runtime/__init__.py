"""What runs while a model is pruned: from a request to its report, and nothing that a user names.

Knows a method as `method.Method` alone, and is given an attachment's data, not its attachment.
May import `costs`, `report`, `hosts` and what stands below; never `pruner` or `methods`.
"""
