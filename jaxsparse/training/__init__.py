"""Choosing what a weight keeps, moving what it stores while it trains, and naming what decays.

`jaxsparse.pruning` and `jaxsparse.dynamic` are the public names of what stands here.
"""
