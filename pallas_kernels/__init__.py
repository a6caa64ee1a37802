"""Sparse products on NVIDIA GPUs, written in Pallas. Each dialect is a back end of its own; they know no format.

`triton` runs on any recent GPU and, interpreted (`interpret`), everywhere; `mosaic` is for Hopper.
"""
