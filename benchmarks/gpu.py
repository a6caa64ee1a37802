"""Everything that a machine with a GPU is asked for, in two calls: python3 benchmarks/gpu.py, from a plain checkout.

Needs no install and no network: JAX, Flax, Optax and NumPy on Python 3.12 are enough. The first call
  ceilings  measures what a copy and a bfloat16 product reach;
  check     compares every kernel with the oracle, the memory of its result poisoned with NaN beforehand;
  sanitize  runs the small ones under compute-sanitizer, where that is installed, and torch_bridge's tests for GPUs
            (`torch tests`), where torch and pytest are: beside the checks;
  time      times the cells that decide what `backend=None` takes, against dense, XLA's own products and PyTorch's
            block-sparse ones; what differs from XLA's result is left out; who won goes to jaxsparse/measured.json, by
            which `backend=None` chooses from then on.
The second
  tune      times the configurations worth trying and writes Mosaic's best to pallas_kernels/mosaic/measured.json; what
            got another one is timed anew;
  time      times a wider grid;
  counters  has the profiler, ncu, count what limits the two kernels that are slowest beside what was predicted.
A third, of no set length, times the rest of the grid. Expected on an H100 with 16 cores:
  call 1  334 s: 669 programs, 78 s to compile them on all cores; 226 s to run;
  call 2  291 s: 714 programs, 52 s to compile them on all cores; 209 s to run, where all that was tuned is timed anew.
Compiling was measured with XLA's compiler for GPUs and no GPU (_gpu_costs.py), so without XLA's own tuning of products,
which needs one; running goes by the predicted limits and by allowances (_gpu_budget.py). Neither was timed on a GPU.
No step begins after --minutes.
Steps are built, which compiles, on all cores, 32 ahead of the one that runs, and nothing is timed while others are
built. They run in a process of their own (_gpu_process.py): a step that never ends, or that breaks the GPU for its
process, is noted as failed, and another process goes on with the next. Each result is written to --out as soon as there
is one, and only a step that failed is run again: a run that was stopped, or used up its --minutes, goes on where it
ended. --report prints tables of what was measured; --choose writes both measured.json by it, where those that a call
wrote stayed on another machine. --dry-run rehearses at toy sizes on any machine, with the interpreted kernels; its
timings mean nothing; it fails where a call is expected to take more than six minutes.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import metadata
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _annotations, _gpu_budget, _gpu_cells, _gpu_limits, _gpu_lost, _gpu_process, _gpu_winners  # noqa: F401  annotations come first
from benchmarks import _gpu_checks as checks
from benchmarks import _gpu_report as report
from benchmarks import _gpu_timings as timings
from benchmarks._gpu_budget import LIMIT, START
from benchmarks._gpu_run import Result, Step, said
from jaxsparse import _measured
from pallas_kernels._device import describe

ROOT = Path(__file__).parents[1]
AHEAD = 32  # steps that are built before they are run: their arrays lie on the GPU meanwhile


def main() -> None:
    args = _arguments()
    out = Path(args.out)
    if args.predict:
        return _predict()
    if args.report:
        return print(report.tables(_read(out)))
    if args.choose:
        return _choose_by(_read(out))
    if args.until is None:
        sys.exit(_gpu_process.supervised(out, 60 * args.minutes))
    run, machine = _read(out), _machine()
    if (there := run.get("machine", machine)["gpu"]) != machine["gpu"]:
        sys.exit(f"{out} has what was measured on {there}, and this is {machine['gpu']}: name another file with --out")
    run |= {"machine": machine, "dry_run": args.dry_run}
    if not args.dry_run:
        _choose_by(run)  # a fresh checkout has the numbers alone
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ", flush=True)
    done = 0
    for call in (1, 2) if args.call is None else (args.call,):
        for stage in _stages(call, args, run):
            for number, count, step, result in _results(stage, args, run):
                print(f"[call {call}, {number}/{count}] {step.name}", end=": ", flush=True)
                if result is None:
                    print(f"{args.minutes:g} minutes are over after {done} steps: run the same command again to go on")
                    sys.stdout.flush()
                    os._exit(_gpu_process.OVER)  # what is being built is given up
                print(_short(result), flush=True)
                done += 1
                _note(run, step, result, args)
    failed = [name for name, result in run["steps"].items() if _failed(result)]
    failed += _too_long() if args.dry_run else []
    print(f"all steps are done, {len(failed)} of them failed {failed or ''}; numbers: {out}")
    sys.exit(bool(failed))


def _note(run: dict, step: Step, result: Result, args) -> None:
    """Writes a result, and what follows from it; ends the process where the GPU does not answer any more."""
    run["steps"][step.name] = result
    for name in set(result.get("others", ())) & run["steps"].keys():  # are timed again
        run["steps"][name]["again"] = True
    _write(Path(args.out), run)
    if step.name.split()[0] in ("time", "tune") and not args.dry_run:
        _choose_by(run)
    if (_failed(result) or result.get("notes")) and not _gpu_process.answers():
        print("the GPU does not answer to this process any more: another one goes on", flush=True)
        _end(run, step, Path(args.out), result.get("error", str(result.get("notes"))))
        os._exit(_gpu_process.LOST)


def _stages(call: int, args, run: dict) -> Iterator[list[Step]]:
    """The steps of a call that are to be made, each stage by what the one before found: tuning comes before what is
    compiled by it, and checks before what is timed where they were right."""
    steps = run["steps"]
    of_call = {1: _first, 2: _second, 3: _third}[call]
    for stage in range(3):
        wanted = [step for step in of_call(args.dry_run, steps) if _stage_of(step.name) == stage]
        wanted = [step for step in wanted if args.only in (None, step.name.split()[0])]
        yield [step for step in wanted if step.name not in run["tried"] and _is_due(step.name, steps)]


def _stage_of(name: str) -> int:
    return 0 if name.startswith("tune ") else 2 if _is_timed(name) or name.startswith("counters ") else 1


def _is_timed(name: str) -> bool:
    return name.startswith(("time ", "tune ", "torch overhead"))


def _is_due(name: str, steps: dict[str, Result]) -> bool:
    """Whether a step was not made, or failed, or would give more now."""
    if name not in steps or _failed(steps[name]) or "again" in steps[name]:
        return True
    missing = set(steps[name].get("left out", ()))
    return bool(missing) and not missing <= _gpu_lost.left_out(name.split()[1], steps)


def _first(dry_run: bool, steps: dict[str, Result]) -> Iterator[Step]:
    """What decides defaults, the most valuable first."""
    yield Step("ceilings", functools.partial(checks.ceilings, 256 if dry_run else 8192))
    yield from checks.checks(dry_run)
    yield from checks.sanitizers(dry_run)
    yield Step("torch tests", functools.partial(checks.torch_tests, dry_run))
    yield from timings.timings(dry_run, _gpu_cells.grid(True) if dry_run else _gpu_cells.deciding(), steps)
    yield Step("torch overhead", functools.partial(checks.torch_overhead, dry_run))


def _second(dry_run: bool, steps: dict[str, Result]) -> Iterator[Step]:
    """Tuning, the rest of the grid, and why the two worst kernels are slow."""
    yield from timings.tunings(dry_run)
    cells = _gpu_cells.grid(True) if dry_run else dict.fromkeys((*_gpu_cells.deciding(), *_gpu_cells.wider()))
    yield from timings.timings(dry_run, cells, steps)
    for cell, backend in timings.worst(steps):
        yield Step(f"counters {backend} {cell.name}", functools.partial(timings.counted, cell, backend))


def _third(dry_run: bool, steps: dict[str, Result]) -> Iterator[Step]:
    """The rest of the grid."""
    timed = {*_gpu_cells.deciding(), *_gpu_cells.wider()}
    yield from timings.timings(dry_run, () if dry_run else (c for c in _gpu_cells.grid(False) if c not in timed), steps)


def _expected() -> dict[int, _gpu_budget.Cost]:
    """What each of the two calls is expected to cost on a GPU."""
    with checks.as_on_an_h100():
        first, counters = list(_first(False, {})), [Step(f"counters {n}", lambda: dict) for n in range(2)]
        done = {step.name for step in first} - timings.retimed()  # at most, those that tuning gave another kernel
        second = [step for step in _second(False, {}) if step.name not in done]
        return {1: _gpu_budget.of_call(first), 2: _gpu_budget.of_call([*second, *counters])}


def _results(todo: list[Step], args, run: dict) -> Iterator[tuple[int, int, Step, Result | None]]:
    """(number, how many, step, its result), built ahead on all cores; None once the time is over."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: collections.deque[Future] = collections.deque()
        waiting = iter(todo)
        for number, step in enumerate(todo, 1):
            before, timing = _begin(run, step, Path(args.out)), _is_timed(step.name)
            # Where a process died, what it was building may have been the reason: that is built one by one.
            most = 1 if args.careful and number <= AHEAD else AHEAD
            for one in itertools.islice(
                waiting, 0 if timing and ahead else most - len(ahead)
            ):  # none while others are timed
                ahead.append(pool.submit(one.build))
            wait(ahead if timing else [ahead[0]], timeout=max(0, args.until - time.time()))
            if time.time() > args.until and len(run["tried"]) > 1:  # one step is made in any case
                run["steps"] = {name: result for name, result in run["steps"].items() if name != step.name} | before
                _write(Path(args.out), run)
                yield number, len(todo), step, None
            if reason := _gpu_lost.why_not_check(step.name, run["steps"]):
                ahead.popleft()
                yield number, len(todo), step, {"error": reason}
                continue
            seconds = step.seconds * (10 if args.dry_run else 1)
            with _gpu_process.ended_after(seconds, functools.partial(_end, run, step, Path(args.out))):
                result = _result(ahead.popleft())
            yield number, len(todo), step, result


def _begin(run: dict, step: Step, out: Path) -> dict[str, Result]:
    """Notes the step as failed until there is a result, as a process that dies in it can't say so; gives what was
    noted before."""
    before = {step.name: run["steps"][step.name]} if step.name in run["steps"] else {}
    run["steps"][step.name] = {"error": f"{_gpu_lost.ENDED}, or while it built what comes next"}
    run["tried"].append(step.name)
    _write(out, run)
    return before


def _end(run: dict, step: Step, out: Path, words: str) -> None:
    """Notes what becomes the result if the process ends."""
    run["steps"][step.name] = {"error": f"{_gpu_lost.ENDED}: {words}"}
    _write(out, run)


def _too_long() -> list[str]:
    """Prints what the calls are expected to cost, and names those that cost too much."""
    found = []
    for call, cost in _expected().items():
        parts = f"{START:.0f} s to start, {cost.compiling:.0f} s to compile {cost.programs} programs"
        print(
            f"call {call} is expected to take {cost.seconds:.0f} of {LIMIT:.0f} s: {parts}, {cost.running:.0f} s to run"
        )
        found += [f"call {call} takes too long"] if cost.seconds > LIMIT else []
    return found


def _result(built: Future) -> Result:
    try:
        run = built.result()
        _gpu_process.doing("")
        return run()
    except Exception as wrong:
        return {"error": said(wrong)}


def _failed(result: Result) -> bool:
    return "error" in result


def _choose_by(run: dict) -> None:
    """What was measured decides what `backend=None` takes on this kind of GPU, and which configurations."""
    words = "{gpu}, jax {jax}, {date}: {command}".format(**run["machine"])
    if won := _gpu_winners.winners(run["steps"], words):
        _measured.write(run["machine"]["gpu"], won)
    timings.configure_by(run["machine"]["gpu"], run["steps"])


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes and interpreted kernels, on any machine")
    parser.add_argument("--predict", action="store_true", help="prints what an H100 allows at best, and runs nothing")
    parser.add_argument("--report", action="store_true", help="prints tables of what --out has, and runs nothing")
    parser.add_argument(
        "--choose", action="store_true", help="writes what is chosen by what --out has, and runs nothing"
    )
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="one call; the first and the second by default")
    parser.add_argument("--only", help="one kind of step: check, sanitize, torch, tune, time or counters")
    parser.add_argument("--minutes", type=float, default=5.5, help="no step begins later than this")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results" / "gpu.json", help="where the numbers are")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the process that runs the steps
    parser.add_argument("--careful", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- what is written ----------------------------------------------------------------------------------


def _machine() -> dict:
    device = describe()
    return {
        "gpu": device.kind or "none",
        "multiprocessors": device.multiprocessors if device.kind else 0,
        "platform": jax.devices()[0].client.platform_version.partition("\n")[0],
        "jax": jax.__version__,
        "torch": next((d.version for d in metadata.distributions(name="torch")), "none"),
        "tools": [name for name in ("compute-sanitizer", "ncu") if shutil.which(name)],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "command": " ".join(["python3", "benchmarks/gpu.py", *_gpu_process.given()]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _read(path: Path) -> dict:
    return {"steps": {}, "tried": []} | (json.loads(path.read_text()) if path.exists() else {})


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _predict() -> None:
    for cell in _gpu_cells.grid(toy=False):
        limits = _gpu_limits.predicted_ms(cell)
        print(cell.name, *(f"{name} {1e3 * ms:.4g} us" for name, ms in limits.items()), sep=", ")


def _short(result: Result) -> str:
    text = {k: round(v, 4) for k, v in result["ms"].items()} if "ms" in result else result
    return str(text)[:300]


if __name__ == "__main__":
    main()
