"""The cost model: what layers store, the machine's profile and its cache, and whether the advice is right."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import pytest
from profiles import PROFILE

from benchmarks import _costs_cells
from jaxsparse import BlockPattern
from jaxsparse._sizes import is_unstructured
from jaxsparse.costs import layers, machine, model

ROOT = Path(__file__).parent.parent
PLACE = (96, 64), 8


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 8), (40, 40)])
def test_bytes_are_those_of_the_pattern_and_its_values(block):
    pattern = BlockPattern.random(jax.random.key(0), PLACE[0], density=0.3, block=block)
    layer = layers.sparse(*PLACE, 0.3) if is_unstructured(block) else layers.block_sparse(*PLACE, 0.3, block)
    assert layer.index_bytes == sum(a.nbytes for a in jax.tree.leaves(pattern))
    assert layer.weight_bytes == 4 * jax.numpy.zeros(pattern.values_shape).size
    assert layer.density == pattern.density and layer.operations == 2 * 8 * layer.weights


def test_a_block_diagonal_layer_takes_blocks_that_divide_both_sizes():
    assert layers.block_diag((768, 3072), 1, 0.1).block == (64, 256)  # of 8, 12 and 16 blocks 12 are nearest to 10
    assert layers.block_diag((7, 11), 1, 0.1).density == 1
    assert layers.block_diag((64, 64), 1, 0).stored == 64


def test_a_layer_that_int32_can_not_count_is_impossible():
    assert "more than int32" in (layers.sparse((10**5, 10**5), 1, 0.5).why_impossible or "")
    assert layers.block_sparse((10**5, 10**5), 1, 0.5, 32).why_impossible is None
    assert layers.block_diag((10**5, 10**5), 1, 0.5).why_impossible is None


# ---- the profile ------------------------------------------------------------------------------------------


def test_a_profile_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(machine, "measure", lambda framework: asked.append(framework) or PROFILE)
    for _ in range(2):  # two processes, as far as memory goes
        machine._known.cache_clear()
        assert machine.profile() == PROFILE
    assert asked == ["jax"] and [p.suffix for p in (tmp_path / "cache").iterdir()] == [".json"]
    monkeypatch.setenv("JAXSPARSE_CPU_ISA", "avx2")  # another instruction set is another machine
    assert machine.profile() == PROFILE and asked == ["jax", "jax"]
    machine._known.cache_clear()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"framework": "jax"}', json.dumps(dataclasses.asdict(PROFILE))[:-30]],
)
def test_a_broken_file_is_measured_anew(tmp_path, monkeypatch, content):
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    machine.cache_file("jax").write_text(content)
    monkeypatch.setattr(machine, "measure", lambda framework: PROFILE)
    machine._known.cache_clear()
    assert machine.profile() == PROFILE == machine.read(machine.cache_file("jax"))
    machine._known.cache_clear()


def test_rates_that_can_not_be_are_no_profile(tmp_path):
    for change in ({"rates": {**PROFILE.rates, "float32": 0}}, {"calls": {"forward": 1.0}}, {"memory": {1: 1.0}}):
        machine.write(tmp_path / "it", dataclasses.replace(PROFILE, **change))
        assert machine.read(tmp_path / "it") is None


def test_a_home_that_can_not_be_written_to_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    machine.write(tmp_path / "file" / "it.json", PROFILE)  # its folder is a file


def test_measuring_gives_a_whole_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0)
    monkeypatch.setattr(machine, "_LARGE", (16, 8))
    monkeypatch.setattr(machine, "_THIN", {1024: 16, 4096: 32})
    machine.write(tmp_path / "it", machine.measure("jax"))
    assert machine.read(tmp_path / "it")


class Slow:
    """A framework whose calls take some seconds on its own clock, and the making of a layer twice as long."""

    wide, threads = staticmethod(lambda dtype: contextlib.nullcontext()), staticmethod(lambda: 2)

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def steps(self, layer, modes):
        self.now += 2 * self.seconds
        return [self.call for _ in modes]

    def call(self):
        self.now += self.seconds


@pytest.mark.parametrize("seconds, measured", [(1e-4, 11), (0.5, 2), (30.0, 2)])
def test_measuring_ends_in_time_on_a_busy_machine_and_says_what_is_estimated(tmp_path, monkeypatch, seconds, measured):
    slow = Slow(seconds)
    monkeypatch.setitem(machine.FRAMEWORKS, "jax", "slow")
    monkeypatch.setitem(sys.modules, "slow", slow)
    found = machine.measure("jax", lambda: slow.now)
    assert slow.now < 10 or seconds > 1
    assert len(found.estimated) == 11 - measured and "float32" not in found.estimated
    machine.write(tmp_path / "it", found)
    assert machine.read(tmp_path / "it") == found


# ---- predictions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("mode", ["forward", "gradients", "step"])
def test_more_work_is_predicted_to_take_longer(framework, mode):
    there = dataclasses.replace(PROFILE, framework=framework)
    make = {
        "rows": lambda n: layers.sparse((512, 512), 64 * n, 0.1),
        "density": lambda n: layers.sparse((512, 512), 64, 0.1 * n),
        "blocks": lambda n: layers.block_sparse((512, 512), 64, 0.1 * n, 16),
        "features": lambda n: layers.dense((512, 512 * n), 64),
    }
    for name, layer in make.items():
        times = [model.seconds(layer(n), there, mode) for n in (1, 2, 4, 8)]
        assert times == sorted(times) and times[0] > 0, name


def test_more_threads_are_predicted_to_be_faster():
    layer = layers.dense((2048, 2048), 256)
    one, two, four = (model.seconds(layer, PROFILE.with_threads(n), "forward") for n in (1, 2, 4))
    assert one > two > four and two == model.seconds(layer, PROFILE, "forward")


def test_factors_lie_between_those_of_the_nearest_knots():
    assert model.shares([8, 32], 8) == [1, 0] and model.shares([8, 32], 32) == [0, 1]
    assert model.shares([8, 32], 16) == [0.5, 0.5]
    assert model.shares([8, 32], 4) == [1, 0] and model.shares([8, 32], 99) == [0, 1]


def test_a_prediction_imports_no_jax_and_allocates_little(tmp_path):
    code = """
import sys, tracemalloc
import jaxsparse
tracemalloc.start()
found = jaxsparse.explain(100_000, 100_000, 65_536, 0.1)
assert tracemalloc.get_traced_memory()[1] < 2e7
print(sorted({"jax", "numpy", "flax", "torch"} & set(sys.modules)))
"""
    environment = {**os.environ, "JAXSPARSE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    machine.write(tmp_path / Path(machine.cache_file("jax")).name, PROFILE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr
    assert not tracemalloc.is_tracing()


@functools.cache
def _sets():
    return _costs_cells.read(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("name", ["FITTED_ON", "OTHER_ISA"])
def test_the_advice_is_right_where_the_measurement_is_clear(name):
    """As benchmarks/costs_fit.py counts: cells in which it is not clear which layer is faster count for neither."""
    cells = [cell for cell in _sets()[getattr(_costs_cells, name)] if cell.layer.kind != "dense" and cell.is_clear]
    for framework in ("jax", "torch"):
        ours = [cell for cell in cells if cell.profile.framework == framework]
        right = sum((cell.ratio > 1) == (cell.predicted_ratio > 1) for cell in ours)
        assert right >= 0.95 * len(ours) and len(ours) > 300, (framework, right, len(ours))


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy, which fits the factors, is not installed")
def test_the_factors_in_the_package_are_those_that_fit_the_results():
    from benchmarks import costs_fit

    cells = _sets()[_costs_cells.FITTED_ON]
    fitted, kept = costs_fit.fit(cells), model._table()
    for framework, kinds in fitted.items():
        for kind, found in kinds.items():
            for mode in ("forward", "gradients"):
                for mine, theirs in zip(found[mode], kept[framework][kind][mode], strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3)
    assert kept["margin"] == pytest.approx(costs_fit.margin(cells), rel=0.01)
