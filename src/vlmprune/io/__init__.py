"""What goes in and comes out: models with their processors, and what processors do to pictures.

May import everything below in the list of rooms, the pruner included, and Transformers' loaders.
"""
