"""Importing the package is light, and its parts are where they are said to be."""

import subprocess
import sys

import pytest

import jaxsparse


def test_import_loads_neither_flax_nor_torch():
    code = "import jaxsparse, sys; print({'flax', 'torch', 'torch_bridge'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_layers_are_resolved_at_first_use():
    assert jaxsparse.BlockDiagDense.__module__ == "jaxsparse.linen"
    assert jaxsparse.BlockDiagLinear.__module__ == "jaxsparse.nnx"
    assert set(jaxsparse.__all__) <= set(dir(jaxsparse))
    with pytest.raises(AttributeError, match="no attribute 'Dense'"):
        _ = jaxsparse.Dense
