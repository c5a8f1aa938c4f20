"""The interception of attention calls; taps, subsets of rows, ragged attention and its kernels.

May import `hosts` and what stands below.
"""
