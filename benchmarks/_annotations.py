"""Stands in for jaxtyping where a machine lacks it: its names occur in annotations only, which nobody evaluates."""

import importlib.util
import sys
import types

if importlib.util.find_spec("jaxtyping") is None:
    names = types.ModuleType("jaxtyping")
    names.__dict__["__getattr__"] = lambda name: None  # any name of it
    sys.modules["jaxtyping"] = names
