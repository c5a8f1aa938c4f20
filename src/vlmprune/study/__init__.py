"""What measures: accuracy, speed, searches, thresholds; in each run, results, tables and plot.

Prints nothing: `cli` does.
May import `io`, `draw`, `catalog`, `methods` and what stands below.
"""
