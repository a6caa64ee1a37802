"""Everything that a machine with a GPU is asked for, in two calls: python3 benchmarks/gpu.py, from a plain checkout.

Needs no install and no network: JAX, Flax, Optax and NumPy on Python 3.12 are enough. The first call
  ceilings  measures what a copy and a bfloat16 product reach;
  check     compares every kernel with the oracle, the memory of its result poisoned with NaN beforehand;
  sanitize  runs the small ones under compute-sanitizer, where that is installed, and torch_bridge's tests for GPUs
            (`torch tests`), where torch and pytest are: beside the checks;
  time      times the cells that decide what `backend=None` takes, against dense, XLA's own products and PyTorch's
            block-sparse ones; who won goes to jaxsparse/measured.json, by which `backend=None` chooses from then on.
The second
  tune      times the configurations worth trying and writes Mosaic's best to pallas_kernels/mosaic/measured.json;
  time      times a wider grid;
  counters  has the profiler, ncu, count what limits the two kernels that are slowest beside what was predicted.
A third, of no set length, times the rest of the grid. Expected on an H100 with 16 cores:
  call 1  332 s: 474 programs, 75 s to compile them on all cores; 226 s to run;
  call 2  248 s: 518 programs, 38 s to compile them on all cores; 180 s to run.
Compiling was measured with XLA's compiler for GPUs and no GPU (_gpu_costs.py), so without XLA's own tuning of products,
which needs one; running goes by the predicted limits and by allowances (_gpu_budget.py). Neither was timed on a GPU.
No step begins after --minutes.
Steps are built, which compiles, on all cores ahead of the one that runs, and nothing is timed before the next 32 are
built. Each result is written to --out as soon as there is one, and only a step that failed is run
again: a run that was stopped, or used up its --minutes, goes on where it ended. --report prints tables of what was
measured. --dry-run rehearses at toy sizes on any machine, with the interpreted kernels; its timings mean nothing; it
fails where a call is expected to take more than six minutes.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _annotations, _gpu_budget, _gpu_cells, _gpu_limits, _gpu_winners  # noqa: F401  annotations come first
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
    if args.predict:
        return _predict()
    out = Path(args.out)
    run = json.loads(out.read_text()) if out.exists() else {"steps": {}}
    if args.report:
        return print(report.tables(run))
    run |= {"machine": _machine(), "dry_run": args.dry_run}
    done = 0
    until = time.monotonic() + 60 * args.minutes
    for call in (1, 2) if args.call is None else (args.call,):
        for number, count, step, result in _results(_todo(call, args, run), until):
            print(f"[call {call}, {number}/{count}] {step.name}", end=": ", flush=True)
            if result is None:
                print(f"{args.minutes} minutes are over after {done} steps: run the same command again to go on")
                sys.stdout.flush()
                os._exit(3)  # what is being built is given up
            print(_short(result), flush=True)
            run["steps"][step.name], done = result, done + 1
            _write(out, run)
            if step.name.startswith("time ") and not args.dry_run:
                _choose_by(run)
    failed = [name for name, result in run["steps"].items() if _failed(result)]
    failed += _too_long() if args.dry_run else []
    print(f"all steps are done, {len(failed)} of them failed {failed or ''}; numbers: {out}")
    sys.exit(bool(failed))


def _todo(call: int, args, run: dict) -> list[Step]:
    """The steps of a call that are not done, or failed."""
    later = {2: lambda: _second(args.dry_run, run["steps"]), 3: lambda: _third(args.dry_run)}
    steps = _first(args.dry_run) if call == 1 else later[call]()
    kinds = [step for step in steps if args.only in (None, step.name.split()[0])]
    return [step for step in kinds if step.name not in run["steps"] or _failed(run["steps"][step.name])]


def _first(dry_run: bool) -> Iterator[Step]:
    """What decides defaults, the most valuable first."""
    yield Step("ceilings", functools.partial(checks.ceilings, 256 if dry_run else 8192))
    yield from checks.checks(dry_run)
    yield from checks.sanitizers(dry_run)
    yield Step("torch tests", functools.partial(checks.torch_tests, dry_run))
    yield from timings.timings(dry_run, _gpu_cells.grid(True) if dry_run else _gpu_cells.deciding())
    yield Step("torch overhead", functools.partial(checks.torch_overhead, dry_run))


def _second(dry_run: bool, steps: dict[str, Result]) -> Iterator[Step]:
    """Tuning, the rest of the grid, and why the two worst kernels are slow."""
    yield from timings.tunings(dry_run)
    decided = set(_gpu_cells.deciding())
    cells = _gpu_cells.grid(True) if dry_run else (cell for cell in _gpu_cells.wider() if cell not in decided)
    yield from timings.timings(dry_run, cells)
    for cell, backend in timings.worst(steps):
        yield Step(f"counters {backend} {cell.name}", functools.partial(timings.counted, cell, backend))


def _third(dry_run: bool) -> Iterator[Step]:
    """The rest of the grid."""
    timed = {*_gpu_cells.deciding(), *_gpu_cells.wider()}
    yield from timings.timings(dry_run, () if dry_run else (c for c in _gpu_cells.grid(False) if c not in timed))


def _expected() -> dict[int, _gpu_budget.Cost]:
    """What each of the two calls is expected to cost on a GPU."""
    with checks.as_on_an_h100():
        counters = [Step(f"counters {n}", lambda: dict) for n in range(2)]
        return {1: _gpu_budget.of_call(_first(False)), 2: _gpu_budget.of_call([*_second(False, {}), *counters])}


def _results(todo: list[Step], until: float) -> Iterator[tuple[int, int, Step, Result | None]]:
    """(number, how many, step, its result), built ahead on all cores; None once the time is over."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: collections.deque[Future] = collections.deque()
        waiting, quiet = iter(todo), False
        for number, step in enumerate(todo, 1):
            while len(ahead) < AHEAD and (one := next(waiting, None)):
                ahead.append(pool.submit(one.build))
            if step.name.startswith("time ") and not quiet:
                quiet = not wait(ahead, timeout=max(0, until - time.monotonic())).not_done
            over = time.monotonic() > until
            yield number, len(todo), step, None if over else _result(ahead.popleft())


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
        return built.result()()
    except Exception as wrong:
        return {"error": said(wrong)}


def _failed(result: Result) -> bool:
    return "error" in result


def _choose_by(run: dict) -> None:
    """What was timed decides what `backend=None` takes on this kind of GPU."""
    words = "{gpu}, jax {jax}, {date}: {command}".format(**run["machine"])
    _measured.write(run["machine"]["gpu"], _gpu_winners.winners(run["steps"], words))


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes and interpreted kernels, on any machine")
    parser.add_argument("--predict", action="store_true", help="prints what an H100 allows at best, and runs nothing")
    parser.add_argument("--report", action="store_true", help="prints tables of what --out has, and runs nothing")
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="one call; the first and the second by default")
    parser.add_argument("--only", help="one kind of step: check, sanitize, torch, tune, time or counters")
    parser.add_argument("--minutes", type=float, default=5.5, help="no step begins later than this")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results" / "gpu.json")
    return parser.parse_args()


# ---- what is written ----------------------------------------------------------------------------------


def _machine() -> dict:
    device = describe()
    return {
        "gpu": device.kind or "none",
        "multiprocessors": device.multiprocessors if device.kind else 0,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python3", "benchmarks/gpu.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


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
