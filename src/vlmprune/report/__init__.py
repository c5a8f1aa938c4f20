"""What a call kept, held, read and saved: plain figures.

Here belong the reports of calls and of their layers. May import `costs`, `views` and `errors`.
"""

from vlmprune.report.call import LEFT, Report, make
from vlmprune.report.layers import LayerReport, RowsReport
from vlmprune.report.reading import ImageTokens, Reading, StepRead

__all__ = [
    "LEFT",
    "ImageTokens",
    "LayerReport",
    "Reading",
    "Report",
    "RowsReport",
    "StepRead",
    "make",
]
