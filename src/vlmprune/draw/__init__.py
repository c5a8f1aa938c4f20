"""Pictures: what was kept, where it lies, and what each layer keeps.

May import `hosts`, `report`, `views` and `io`.
"""
