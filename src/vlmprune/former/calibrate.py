"""`vlmprune.study.calibrate.run` under its former name, as docs/stability.md promises."""

from vlmprune.study.calibrate.run import (
    BINS,
    Gammas,
    check_quantiles,
    check_target,
    document,
    measure,
    plot,
    questions_for,
    save,
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
