"""The benchmark for GPUs rehearsed: from a plain checkout, without what only an install brings, stopped and resumed."""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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


@pytest.mark.slow  # a dry run of the whole benchmark
@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_a_run_that_was_stopped_goes_on_where_it_ended(rehearse):
    code, said, first = rehearse("--only", "check", "--minutes", "0.01")
    assert code == 3 and "run the same command again" in said, said
    assert 1 <= len(first["steps"]) < 4
    code, said, run = rehearse()
    assert code == 0 and all(run["steps"][name] == result for name, result in first["steps"].items()), said
    kinds = {name.split()[0] for name in run["steps"]}
    assert kinds == {"ceilings", "check", "sanitize", "torch", "time", "tune"}
    assert run["steps"]["ceilings"]["bfloat16 TFLOP/s"] > 0
    for name, result in run["steps"].items():
        if name.startswith("time"):
            assert {"ours (chosen)", "ours (xla)"} <= result["ms"].keys() and not result["notes"], (name, result)
            assert min(result["predicted_limit_ms"].values()) > 0
    code, said, again = rehearse()
    assert code == 0 and again["steps"] == run["steps"] and not re.search(r"\b1/\d", said)
    assert "call 1 is expected to take" in said and "call 2 is expected to take" in said
    code, said, _ = rehearse("--report")
    assert code == 0 and "A rehearsal" in said and "| blocks 32x64x64 block 16 density 0.5 float32 forward |" in said
    assert "- sanitize memcheck: a dry run" in said and "Failed" not in said


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_each_call_is_expected_to_fit_its_six_minutes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_budget, gpu

    first, second = gpu._expected().values()
    assert first.programs > 300 and second.programs > 300  # the steps of a GPU, not of this machine
    assert gpu._too_long() == []
    for cost in (first, second):
        words = f"{cost.seconds:.0f} s: {cost.programs} programs, {cost.compiling:.0f} s to compile"
        assert words in (gpu.__doc__ or "") and f"{cost.running:.0f} s to run" in (gpu.__doc__ or "")
    monkeypatch.setitem(_gpu_budget.SECONDS, "triton", 8.0)
    assert gpu._too_long() == ["call 1 takes too long"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
@pytest.mark.parametrize("block", [32, 64])
def test_the_kernels_that_share_what_they_load_are_checked(block, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_checks
    from pallas_kernels.mosaic import configs

    pattern, m = _gpu_checks._pattern(block, 1000, "together"), 1000
    rows, columns = pattern.grid
    assert isinstance(configs.for_gather(m, rows * block, block, block, columns, pattern.nnzb), configs.Union)
    assert isinstance(configs.for_sample(m, block, block, pattern.nnzb, rows, columns), configs.Supertile)
    sharing = _gpu_checks._pattern(block, 1000, "sharing x")
    config = configs.for_gather(m, rows * block, block, block, columns, sharing.nnzb)
    assert isinstance(config, configs.Union) and config.sharing == 2
    with _gpu_checks.as_on_an_h100():
        names = [step.name for step in _gpu_checks.checks(dry_run=False)]
    for kind in ("together", "sharing x"):
        assert any(name.startswith(f"check mosaic block {block} {kind}") for name in names)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_programs_that_share_x_are_timed_beside_those_that_do_not(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_cells
    from pallas_kernels.mosaic import configs

    cell = _gpu_cells.Cell("blocks", 8192, (4096, 4096), (32, 32), 0.1, "forward")
    found = _gpu_cells.contenders(cell, ["mosaic"])
    assert found[_gpu_cells.X_APART].within is configs.x_apart
    with configs.x_apart():
        assert not _gpu_cells.shares_x(cell)


def as_in_a_process(tmp_path, **how):
    """The arguments of a process that runs steps, and what it has noted."""
    how = {"until": time.time() + 60, "careful": False, "dry_run": True, "out": tmp_path / "gpu.json"} | how
    return argparse.Namespace(**how), {"steps": {}, "tried": []}


def test_a_wrong_kernel_fails_its_step_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_checks, gpu
    from benchmarks._gpu_run import Step
    from pallas_kernels import interpret

    spmm = interpret.spmm
    monkeypatch.setattr(interpret, "spmm", lambda *a, **how: spmm(*a, **how).at[0, 0].add(1))
    check = functools.partial(_gpu_checks.check, "interpret", 16, "float32", 3)
    todo = [Step("wrong", check), Step("not built", lambda: 1 / 0), Step("right", lambda: lambda: {"ok": True})]
    wrong, unbuilt, right = (result for *_, result in gpu._results(todo, *as_in_a_process(tmp_path)))
    assert gpu._failed(wrong) and "AssertionError: y is off by" in wrong["error"]
    assert gpu._failed(unbuilt) and "ZeroDivisionError" in unbuilt["error"] and right == {"ok": True}


DYING = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from benchmarks import _gpu_checks, _gpu_process, _gpu_timings, gpu
from benchmarks._gpu_run import Step

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_once_the_others_ran():  # it is built beside them
    while '"right 2"' not in open(sys.argv[sys.argv.index("--out") + 1]).read():
        time.sleep(0.05)
    killed()

def killed_in_a_kernel():
    _gpu_process.doing("ours (triton)")
    killed()

def without_a_gpu():
    _gpu_process.answers = lambda: False
    raise RuntimeError("an illegal memory access")

right = lambda: lambda: {{"ok": True}}
gpu._first = lambda dry_run, steps: [
    Step("right", right),
    Step("endless", lambda: lambda: time.sleep(60), seconds=0.1),
    Step("without a GPU", lambda: without_a_gpu),
    *(Step(f"right {{n}}", right) for n in range(3)),
    Step("killed while it is built", killed_once_the_others_ran),
    Step("last", right),
    Step("check triton block 1 int32 float32 batch 1", lambda: killed_in_a_kernel),
    Step("check triton block 1 int32 float32 batch 100", right),
    Step("check triton block 1 uint16 float32 batch 1", right),
]
gpu._too_long = lambda: []
gpu.main()
"""


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_what_is_off_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_cells, _gpu_timings
    from pallas_kernels import interpret

    spmm = interpret.spmm
    monkeypatch.setattr(interpret, "spmm", lambda *a, **how: spmm(*a, **how).at[0, 0].set(jnp.nan))
    cell = _gpu_cells.Cell("blocks", 4, (32, 32), (16, 16), 0.5, "forward", "float32")
    result = _gpu_timings._time(cell, ["interpret"], [])()
    assert result["notes"] == {"ours (interpret)": "AssertionError: off by nan of the largest number"}
    assert result["ms"].keys() == {"ours (xla)", "ours (chosen)", "dense"}


@pytest.mark.slow  # processes
@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_a_step_that_hangs_or_takes_the_gpu_or_the_process_with_it_costs_itself_alone(tmp_path):
    program, out = tmp_path / "dying.py", tmp_path / "gpu.json"
    program.write_text(DYING.format(root=str(ROOT)))
    command = [sys.executable, program, "--dry-run", "--call", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    steps = json.loads(out.read_text())["steps"]
    failed = {name for name, result in steps.items() if "error" in result}
    check = "check triton block 1"
    like = {
        f"{check} int32 float32 batch {m}" for m in (1, 100)
    }  # the second isn't made, as the first killed its process
    assert failed == {"endless", "without a GPU", "killed while it is built"} | like, done.stdout + done.stderr
    rights = {"right", "right 0", "right 1", "right 2", "last"}
    assert steps.keys() - failed == rights | {f"{check} uint16 float32 batch 1"}
    assert steps[f"{check} int32 float32 batch 1"]["error"].endswith("while it ran ours (triton)")
    assert done.returncode == 1 and "no end after" in done.stdout and "does not answer" in done.stdout


def test_kernels_that_ended_their_process_are_left_out_of_what_comes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_lost, gpu

    lost = {"error": f"{_gpu_lost.ENDED}: no end after 20 s"}
    first = "check mosaic block 32 sharing x float16 batch 1000"
    steps = {first: lost, "check triton block 16 random float32 batch 1": {"error": "y is off"}}
    assert _gpu_lost.why_not_check(first, steps) is None  # it may have been mended
    assert "sharing x" in str(_gpu_lost.why_not_check("check mosaic block 64 sharing x bfloat16 batch 1000", steps))
    others = ("mosaic block 64 random bfloat16", "triton block 16 random bfloat16", "triton block 1 uint16 float32")
    assert not any(_gpu_lost.why_not_check(f"check {other} batch 100", steps) for other in others)
    assert _gpu_lost.left_out("blocks", steps) == {"mosaic"}
    assert _gpu_lost.left_out("block-diagonal", steps) == _gpu_lost.left_out("unstructured", steps) == set()
    steps |= {f"check mosaic block 32 {kind} float16 batch 1000": lost for kind in ("random", "together")}
    assert "3 kinds" in str(_gpu_lost.why_not_check("check mosaic block 16 block-diagonal bfloat16 batch 1", steps))
    steps["time unstructured 1x4096x4096"] = {"error": f"{_gpu_lost.ENDED}: no end after 30 s of ours (triton)"}
    assert _gpu_lost.left_out("unstructured", steps) == {"triton"}
    steps["time blocks"] = {"ms": {}, "left out": ["mosaic"]}
    assert not gpu._is_due("time blocks", steps)
    assert gpu._is_due("time blocks", {"time blocks": steps["time blocks"]})  # what kept mosaic out was mended


def test_nothing_is_built_while_others_are_timed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu
    from benchmarks._gpu_run import Step

    monkeypatch.setattr(gpu, "AHEAD", 2)
    built, timed = [], []

    def build(n):
        time.sleep(0.05)
        built.append(n)
        return lambda: timed.append(len(built)) or {"ok": True}

    todo = [Step(f"time {n}", functools.partial(build, n)) for n in range(5)]
    assert all("ok" in result for *_, result in gpu._results(todo, *as_in_a_process(tmp_path)))
    assert timed == [2, 2, 4, 4, 5]


def test_a_command_beside_the_steps_must_end_in_time_and_say_what_is_wanted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks._gpu_run import beside

    say = sys.executable, "-c", "print('3 passed')"
    assert "3 passed" in beside(*say, wanted=" passed")()["ok"] and "error" in beside(*say, wanted="failed")()
    assert "longer than 0.2 s" in beside(sys.executable, "-c", "import time; time.sleep(9)", seconds=0.2)()["error"]


def test_the_report_has_all_that_was_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_report

    cell = "blocks 8192x4096x4096 block 64 density 0.25 bfloat16"
    ms = {"ours (mosaic)": 0.1, "ours (triton)": 0.3, "ours (xla)": 0.4, "ours (chosen)": 0.4, "dense": 0.35}
    steps = {
        f"time {cell} forward": {"ms": ms, "predicted_limit_ms": {"ours": 0.08, "dense": 0.278}},
        "tune gather 64x64 density 1/4 batch 8192": {"ms": {"first": 0.2, "second": 0.1}, "best": "second"},
        "torch tests": {"ok": "...\n15 passed in 60 s\n"},
        "counters mosaic": {"ok": "kernel,metric\njsgather,90\nother,1"},
        "sanitize racecheck": {"error": "a race"},
    }
    said = _gpu_report.tables({"machine": {"gpu": "GPU"}, "steps": steps})
    assert f"| {cell} forward | 80 | 100 | 80% | 69% | ours (mosaic) | 4.00 | 3.50 |" in said.splitlines()
    for line in ("second, 2.00x the first", "15 passed", "kernel,metric", "sanitize racecheck: a race"):
        assert line in said


def test_results_are_written_over_memory_full_of_nan(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_checks
    from benchmarks._gpu_run import Program

    program = Program(lambda x: {"y": x + 1, "z": x.astype(jnp.bfloat16)}, jnp.ones((64, 64)))
    program.compile()
    results = program()
    places = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(results)]
    spoilt, _ = _gpu_checks.poisoned(program)(results)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(spoilt)] == places
    assert all(jnp.isnan(a).all() for a in jax.tree.leaves(spoilt))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="benchmarks/gpu.py is for machines with Python 3.12")
def test_a_tuned_configuration_is_taken_and_what_it_may_change_is_timed_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_checks, _gpu_timings
    from pallas_kernels.mosaic import configs

    monkeypatch.setattr(configs, "MEASURED", tmp_path / "measured.json")
    sizes = 8192, 4096, 64, 64, 64, 1024
    key, best = configs.key("gather", 8192, 0.25, 64, 64), list(configs.candidates_for_gather(*sizes))[1]
    steps = {f"tune {key}": {"best": json.dumps(best._asdict())}, "tune entries batch 4": {"best": "512"}}
    _gpu_timings.configure_by("GPU", {**steps, "tune sample": {"error": "no memory"}})
    try:
        assert configs.for_gather(*sizes, "GPU") == best != configs.for_gather(*sizes, "another GPU")
        few = 8192, 256, 64, 64, 4, 4
        assert configs.for_gather(*few, "GPU") == next(configs.candidates_for_gather(*few))  # of another kernel
        assert configs.for_gather(*few[:-1], None, "GPU") == next(configs.candidates_for_gather(*few[:-1], None))
    finally:
        configs._measured.cache_clear()
    name = "time blocks 8192x4096x4096 block 64 density 0.25 bfloat16"
    assert _gpu_timings._timed_with({key}) == {f"{name} forward", f"{name} dX", f"{name} step"}
    with _gpu_checks.as_on_an_h100():
        assert f"{name} step" in _gpu_timings.retimed()


def test_what_was_timed_becomes_what_is_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _gpu_cells, _gpu_winners

    cells = {(c.family, c.batch, c.block[0], c.mode, c.density, c.dtype): c for c in _gpu_cells.grid(toy=False)}
    timed = {
        ("blocks", 8192, 128, "forward", 0.1, "bfloat16"): {"mosaic": 1.0, "triton": 1.5, "xla": 2.0},
        ("blocks", 8192, 128, "step", 0.1, "bfloat16"): {"mosaic": 9.0, "xla": 3.0},
        ("blocks", 8192, 128, "dW", 0.1, "bfloat16"): {"mosaic": 1.0, "xla": 1.02},
        ("unstructured", 2048, 1, "step", 0.1, "bfloat16"): {"triton": 1.0, "xla": 1.5},
    }
    steps = {
        f"time {cells[cell].name}": {"ms": {f"ours ({name})": t for name, t in ms.items()} | {"dense": 0.1}}
        for cell, ms in timed.items()
    }
    steps["time of another benchmark"] = {"error": "no memory"}
    right = {
        f"check {name} block {b} random bfloat16 batch 1": {"ok": True}
        for name in ("mosaic", "triton")
        for b in (1, 128)
    }
    found = {
        (r.workload.op, r.workload.block[0]): (r.backend, r.times_as_fast)
        for r in _gpu_winners.winners(steps | right, "")
    }
    assert found == {
        ("spmm", 128): ("mosaic", 2.0),  # not by the step, as it was timed alone
        ("sddmm", 128): ("xla", 1.0),  # 2 % are no win
        ("spmm_grads", 1): ("triton", 1.5),
        ("sddmm", 1): ("triton", 1.5),
        ("spmm", 1): ("triton", 1.5),
    }
    wrong = {"check mosaic block 128 sharing x bfloat16 batch 1000": {"error": "y is off"}}
    found = {r.backend for r in _gpu_winners.winners(steps | right | wrong, "") if r.workload.block[0] == 128}
    assert found == {"triton", "xla"}  # what computes wrong numbers wins nothing
    assert {r.backend for r in _gpu_winners.winners(steps, "")} == {"xla"}  # nor what nobody has checked
