"""What measures: accuracy, speed, searches, thresholds; in each run, results, tables and plot.

Prints nothing: `cli` does. Down the arrows: compare, search; evals, bench, calibrate; tasks,
one_question; measure; wording, markdown; stats. May import `draw`, `io`, and what is below them.
"""
