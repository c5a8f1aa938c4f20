"""Pictures: what was kept, where it lies, and what each layer keeps.

Here belongs what makes an image of a report, and runs no model.
May import `io`, `report`, `hosts`, `views` and `errors`.
"""
