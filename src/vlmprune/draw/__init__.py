"""Pictures: what was kept, where it lies, and what each layer keeps; and how every plot looks.

Here belongs what makes an image of a report, and runs no model.
May import `io`, `report`, `costs`, `hosts`, `views` and `errors`.
"""
