"""Importing the package is light, and its parts are where they are said to be."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import jaxsparse

ROOT = Path(__file__).parent.parent


def test_import_loads_neither_flax_nor_torch():
    code = "import jaxsparse, sys; print({'flax', 'torch', 'torch_bridge'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_version_stands_in_one_place():
    for name in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^version\b", (ROOT / name).read_text(), re.MULTILINE), name


def test_the_sdist_holds_what_a_build_a_test_run_and_a_licence_need(tmp_path, monkeypatch):
    build = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core is not installed")
    monkeypatch.chdir(ROOT)
    name = build.build_sdist(str(tmp_path))
    assert name == f"jaxsparse-{jaxsparse.__version__}.tar.gz"
    with tarfile.open(tmp_path / name) as tar:
        names = {member.partition("/")[2] for member in tar.getnames()}
    sources = {f"cpu_kernels/{path.name}" for path in (ROOT / "cpu_kernels").glob("*") if path.suffix in (".cc", ".h")}
    assert (
        sources | {"cpu_kernels/CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= names
    )
    assert not {name for name in names if name.startswith((".venv", "out/", "build/")) or name.endswith(".so")}


def test_layers_are_resolved_at_first_use():
    assert jaxsparse.BlockDiagDense.__module__ == "jaxsparse.linen"
    assert jaxsparse.BlockDiagLinear.__module__ == "jaxsparse.nnx"
    assert set(jaxsparse.__all__) <= set(dir(jaxsparse))
    with pytest.raises(AttributeError, match="no attribute 'Dense'"):
        _ = jaxsparse.Dense
