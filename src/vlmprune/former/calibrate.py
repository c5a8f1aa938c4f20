"""`vlmprune.study.calibrate` in one module, as docs/stability.md promises."""

from vlmprune.io.outputs import check_target
from vlmprune.io.outputs import save_json as save
from vlmprune.study.calibrate.plot import plot
from vlmprune.study.calibrate.results import BINS, Gammas, document
from vlmprune.study.calibrate.run import (
    check_quantiles,
    measure,
    questions_for,
    thresholds,
)

__all__ = [
    "BINS",
    "Gammas",
    "check_quantiles",
    "check_target",
    "document",
    "measure",
    "plot",
    "questions_for",
    "save",
    "thresholds",
]
