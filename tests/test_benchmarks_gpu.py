"""The benchmark for GPUs rehearsed: from a plain checkout, without what only an install brings, stopped and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a dry run of the whole benchmark
ROOT = Path(__file__).parents[1]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxtyping", "matplotlib", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("jaxtyping", "torch") else find(name, *a)
"""


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """A function that runs a dry run and gives its exit code, output and numbers."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "sitecustomize.py").write_text(BLOCKED)
    out = folder / "gpu.json"

    def run(*arguments):
        command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry-run", "--out", out, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())

    return run


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_a_run_that_was_stopped_goes_on_where_it_ended(rehearse):
    code, said, first = rehearse("--only", "check", "--minutes", "0.01")
    assert code == 3 and "run the same command again" in said, said
    assert 1 <= len(first["steps"]) < 4
    code, said, run = rehearse()
    assert code == 0 and all(run["steps"][name] == result for name, result in first["steps"].items()), said
    assert {name.split()[0] for name in run["steps"]} == {"check", "sanitize", "tune", "time"}
    for name, result in run["steps"].items():
        if name.startswith("time"):
            assert {"ours (chosen)", "ours (xla)"} <= result["ms"].keys() and not result["notes"], (name, result)
            assert min(result["predicted_limit_ms"].values()) > 0
    code, said, again = rehearse()
    assert code == 0 and again["steps"] == run["steps"] and "[1/" not in said


def test_a_wrong_kernel_fails_the_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu
    from pallas_kernels import interpret

    spmm = interpret.spmm
    monkeypatch.setattr(interpret, "spmm", lambda *a, **how: spmm(*a, **how).at[0, 0].add(1))
    result = gpu._result(lambda: gpu._check("interpret", 16, "float32", 3))
    assert gpu._failed(result) and "AssertionError: y is off by" in result["error"]
