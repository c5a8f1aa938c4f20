"""What users hold: `Pruner`, `Chain`, and the `Handle` that an attachment gives.

May import `runtime` and what stands below; methods import it.
"""
