"""The interception of attention calls; taps, subsets of rows, ragged attention and its kernels.

May import `runtime.scope`, `hosts` and what stands below.
"""
