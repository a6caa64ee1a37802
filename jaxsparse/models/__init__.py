"""Whole models: rules that say which of their layers become sparse, what replaces these, and what a model stores.

`jaxsparse.surgery` is the public name of the replacement in Flax; `torch_bridge.patch` does it by the same rules.
"""
