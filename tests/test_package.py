"""Importing the package is light, and its parts are where they are said to be."""

import importlib.util
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


DOORS = {
    "jaxsparse.dynamic": "CHUNK compact gradual move rigl set_",
    "jaxsparse.pruning": "Schedule budget cyclic erk one_shot polynomial prune_updates score top_k top_mask uniform",
    "jaxsparse.surgery": "SparsifiedLinen densify densify_variables keep_faster sparsify sparsify_linen "
    "sparsify_variables",
}


@pytest.mark.parametrize("path", DOORS)
def test_a_door_leads_to_all_that_stands_behind_it(path):
    door = importlib.import_module(path)
    assert door.__all__ == DOORS[path].split()
    homes = {getattr(getattr(door, name), "__module__", "typing") for name in door.__all__}
    homes = [importlib.import_module(home) for home in homes if home.startswith("jaxsparse.")]
    here = {n for m in homes for n, v in vars(m).items() if getattr(v, "__module__", "") == m.__name__ and n[0] != "_"}
    assert here and here <= set(door.__all__), "a public function without its public name"


def test_every_planted_fault_fits_the_code_and_names_a_test():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    for fault in mutants.MUTANTS:
        path, _, test = fault.test.partition("::")
        assert (ROOT / fault.file).read_text().count(fault.right) == 1, fault.name
        assert f"\ndef {test}(" in (ROOT / path).read_text(), fault.name
    assert len({fault.name for fault in mutants.MUTANTS}) == len(mutants.MUTANTS) > 0
