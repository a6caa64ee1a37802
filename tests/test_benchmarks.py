"""The benchmark runs from end to end and says what it found; no timing is judged here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = ["unstructured", "blocks", "small batch", "large batch", "block-diagonal", "first call"]
missing = [name for name in ("torch", "matplotlib") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed"),
    pytest.mark.slow,
    pytest.mark.xdist_group("benchmarks"),  # one worker, one quick run
]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    """`benchmarks` is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(standard output, JSON, path) of one quick run, in which SparseLab can't be imported."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['sparselab'] = None\n")
    out = folder / "sub" / "numbers.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cpu.py"), "--quick", "--judge", "ours (xla)", "--out", str(out)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout, json.loads(out.read_text()), out


def test_the_numbers_name_the_machine_and_the_command(quick):
    _, run, _ = quick
    assert {"cpu", "cores", "kernels", "torch_threads", "versions", "command", "date"} <= run["machine"].keys()
    assert run["machine"]["command"].startswith("python benchmarks/cpu.py --quick")
    assert all(limit > 0 for limit in run["limits"].values())


def test_every_family_has_cells_with_forward_and_training_apart(quick):
    _, run, _ = quick
    assert list(dict.fromkeys(cell["family"] for cell in run["cells"])) == FAMILIES
    for family in set(FAMILIES) - {"small batch"}:
        assert {cell["mode"] for cell in run["cells"] if cell["family"] == family} == {"forward", "training"}


def test_every_contender_has_a_time_or_a_reason(quick):
    _, run, _ = quick
    for cell in run["cells"]:
        assert "ours (xla)" in cell["results"] and "JAX dense" in cell["results"]
        for name, result in cell["results"].items():
            assert (result["ms"] is None) == (not result["rounds"])
            assert result["rounds"] or result["note"], f"{name} in {cell['label']}"
            assert "wrong result" not in result["note"], f"{name} in {cell['label']}: {result['note']}"


def test_a_peer_that_cannot_run_shows_why(quick):
    output, run, _ = quick
    notes = {cell["results"]["SparseLab"]["note"] for cell in run["cells"] if cell["family"] == "unstructured"}
    assert len(notes) == 1 and "ModuleNotFoundError" in notes.pop()
    assert "ModuleNotFoundError" in output
    training = [c for c in run["cells"] if c["family"] == "blocks" and c["mode"] == "training"]
    assert all(c["results"]["torch BSR"]["note"] in output for c in training)


def test_ratios_are_medians_over_rounds(quick):
    _, run, _ = quick
    cell = next(c for c in run["cells"] if c["family"] == "unstructured" and c["mode"] == "training")
    line = next(ln for ln in run["judgements"] if ln["workload"] == cell["label"])
    dense, ours = (cell["results"][name]["rounds"] for name in (line["against"].split("against ")[1], "ours (xla)"))
    assert line["ratio"] == pytest.approx(np.median(np.divide(dense, ours)), rel=1e-2)


@pytest.mark.parametrize(
    "ratio, verdict", [(0.9, "below target"), (1.5, "met"), (2.5, "aim met"), (None, "not measured")]
)
def test_verdicts_are_honest(ratio, verdict):
    from benchmarks import _judge

    assert _judge._verdict({"ratio": ratio, "at_least": 1.2, "aim": 2}) == verdict


def test_a_contender_with_a_wrong_result_is_not_timed():
    from benchmarks import _measure

    rows, calls = np.ones((2, 3), np.float32), {"right": lambda: lambda: rows, "wrong": lambda: lambda: 1.01 * rows}
    results = _measure.measure(calls, rows, seconds=0.01, longest=1.0, keep=())
    assert len(results["right"].rounds) >= 7 and not results["wrong"].rounds
    assert "wrong result" in results["wrong"].note


def test_a_slow_contender_is_called_once_and_says_so():
    from benchmarks import _measure

    rows = np.ones((2, 3), np.float32)

    def slow():
        time.sleep(0.1)
        return rows

    results = _measure.measure({"slow": lambda: slow, "fast": lambda: lambda: rows}, rows, 0.01, longest=0.02, keep=())
    assert len(results["slow"].rounds) == 1 and "one call" in results["slow"].note


def test_the_picture_is_drawn(quick):
    import matplotlib.image

    pixels = matplotlib.image.imread(quick[2].with_suffix(".png"))
    assert min(pixels.shape[:2]) > 800
    assert (pixels[..., :3].min(axis=2) < 0.9).mean() > 0.05


def test_the_benchmark_of_the_bridge_measures_everybody_or_says_why_not(tmp_path):
    out = tmp_path / "bridge.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "bridge.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    run = json.loads(out.read_text())
    assert {"cpu", "versions", "command", "date"} <= run["machine"].keys()
    for workloads in run["runs"].values():
        for workload in workloads.values():
            results = workload["results"]
            assert all(r["us"] or r["note"] for r in results.values())
            assert all(r["us"] for name, r in results.items() if name.startswith(("ours", "torch ")) or name == "torch")


def test_the_cost_of_moving_is_reported(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "moving.py"), "--size", "128", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "numbers.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [1, 32]
    assert all(row["ms"]["step"] > 0 and row["rigl_in_steps"] > 0 and row["memory_of_dense"] < 0.2 for row in rows)


def test_two_builds_of_the_kernels_are_compared_product_by_product(tmp_path):
    from cpu_kernels import direct
    from cpu_kernels._library import opened

    if reason := direct.why_not():
        pytest.skip(f"the kernels can't be called directly: {reason}")
    libraries = [opened()._name, str(tmp_path / "other_build.so")]
    shutil.copy(*libraries)
    out = tmp_path / "builds.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "builds.py"), *libraries, "--quick", "--seconds", "0.01"]
    done = subprocess.run(
        [*command, "--fresh", "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    cells = json.loads(out.read_text())["cells"]
    assert {cell["product"] for cell in cells} == {"y", "dx", "dW", "dx, dW"}
    assert all(cell["rounds"] >= 6 and cell["ratio"] > 0 and cell["old_ms"] > 0 for cell in cells)
    assert "geometric mean" in done.stdout


def test_builds_that_disagree_are_not_timed():
    from benchmarks import builds

    assert builds._apart(np.ones(3), np.ones(3)) == 0
    assert builds._apart(np.ones(3), np.full(3, 1.01)) > builds.SPREAD


def test_the_benchmark_of_loading_compares_with_torch(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "loading.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "loading.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert set(cells) == {"one weight from a file", "a pruned RoBERTa"}
    assert all(len(result["rounds"]) == 2 for cell in cells.values() for result in cell.values())
