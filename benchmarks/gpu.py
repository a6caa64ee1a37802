"""Everything that a machine with a GPU is asked for, in steps: python3 benchmarks/gpu.py, from a plain checkout.

Needs no install and no network: JAX, Flax, Optax and NumPy on Python 3.12 are enough. In this order, it
  check     compares every kernel with the oracle, the memory of its result poisoned with NaN beforehand;
  sanitize  runs the small ones under compute-sanitizer, where that is installed;
  tune      times the configurations worth trying and writes Mosaic's best to pallas_kernels/mosaic/measured.json;
  time      times the grid of workloads against dense, XLA's own products and PyTorch's block-sparse ones; who won goes
            to jaxsparse/measured.json, by which `backend=None` chooses from then on.
Each step's result is written to --out as soon as there is one, and only a step that failed is run again: a run that
was stopped, or used up its --minutes, goes on where it ended. --dry-run rehearses at toy sizes on any machine,
with the interpreted kernels; its timings mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _annotations, _gpu_cells, _gpu_limits, _gpu_torch, _gpu_winners  # noqa: F401  annotations first
from jaxsparse import BlockPattern, _backends, _measured, block_diag_matmul, spmm, testing
from pallas_kernels._device import describe
from pallas_kernels._lines import lines_of
from pallas_kernels.mosaic import configs

ROOT = Path(__file__).parents[1]
STEPS = ("check", "sanitize", "tune", "time")
Step = tuple[str, Callable[[], dict]]


def main() -> None:
    args = _arguments()
    if args.predict:
        return _predict()
    out = Path(args.out)
    run = json.loads(out.read_text()) if out.exists() else {"steps": {}}
    run |= {"machine": _machine(), "dry_run": args.dry_run}
    steps = {"check": _checks, "sanitize": _sanitizers, "tune": _tunings, "time": _timings}
    todo = [step for name in STEPS if args.only in (None, name) for step in steps[name](args)]
    until, done = time.monotonic() + 60 * args.minutes, 0
    for number, (name, step) in enumerate(todo, 1):
        if name in run["steps"] and not _failed(run["steps"][name]):
            continue
        if time.monotonic() > until:
            print(f"{args.minutes} minutes are over after {done} steps: run the same command again to go on")
            sys.exit(3)
        print(f"[{number}/{len(todo)}] {name}", end=": ", flush=True)
        result, done = _result(step), done + 1
        print(_short(result), flush=True)
        run["steps"][name] = result
        _write(out, run)
        if name.startswith("time ") and not args.dry_run:
            said = "{gpu}, jax {jax}, {date}: {command}".format(**run["machine"])
            _measured.write(run["machine"]["gpu"], _gpu_winners.winners(run["steps"], said))
    failed = [name for name, result in run["steps"].items() if _failed(result)]
    print(f"{len(todo)} steps are done, {len(failed)} of them failed {failed or ''}; numbers: {out}")
    sys.exit(bool(failed))


def _result(step: Callable[[], dict]) -> dict:
    try:
        return step()
    except Exception as wrong:
        return {"error": _said(wrong)}


def _failed(result: dict) -> bool:
    return "error" in result


def _said(wrong: Exception) -> str:
    return f"{type(wrong).__name__}: {str(wrong)[:3000]}"


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes and interpreted kernels, on any machine")
    parser.add_argument("--predict", action="store_true", help="prints what an H100 allows at best, and runs nothing")
    parser.add_argument("--only", choices=STEPS, help="one kind of step")
    parser.add_argument("--minutes", type=float, default=9, help="no step begins later than this")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results" / "gpu.json")
    return parser.parse_args()


def _backends_here(args, dtype: str, block) -> list[str]:
    named = ("interpret",) if args.dry_run else ("mosaic", "triton")
    return [name for name in named if _backends.why_not(name, "spmm", dtype, block) is None]


# ---- check ------------------------------------------------------------------------------------------


def _checks(args) -> Iterator[Step]:
    blocks = (1, 16) if args.dry_run else (1, 16, 32, 64, 128)
    dtypes = ("float32",) if args.dry_run else ("bfloat16", "float16", "float32")
    for block in blocks:
        for dtype in dtypes:
            for backend in _backends_here(args, dtype, (block, block)):
                for m in (33,) if args.dry_run else (1, 100, 1000):
                    for kind in ("int32", "uint16") if block == 1 else ("random", "block-diagonal"):
                        name = f"check {backend} block {block} {kind} {dtype} batch {m}"
                        yield name, functools.partial(_check, backend, block, dtype, m, kind)


def _check(backend: str, block: int, dtype: str, m: int, kind: str = "random") -> dict:
    """Raises unless y, with gelu and without, and all gradients are as `testing` wants them."""
    if kind == "block-diagonal":
        pattern = BlockPattern.block_diagonal(3, (block, 2 * block))
        product = functools.partial(block_diag_matmul, backend=backend)
    else:
        pattern = _pattern(block, m, kind)
        product = lambda x, w, b, **how: spmm(x, w, pattern, b, backend=backend, **how)  # noqa: E731
    x, blocks, bias, dy = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, jnp.dtype(dtype))
    f = jax.jit(lambda *a: testing.value_and_gradients(product, *a) | {"gelu": product(*a[:3], activation="gelu")})
    precise = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precise):
        truth = testing.true_products(x, blocks, bias, dy, pattern)
        dense = testing.dense_products(x, blocks, bias, dy, pattern)
        truth["gelu"] = jax.nn.gelu(truth["y"].astype(np.float32))
        dense["gelu"] = jax.nn.gelu(dense["y"].astype(np.float32)).astype(dtype)
        f(x, blocks, bias, dy)
        _poison(4 * (m * sum(pattern.shape) + blocks.size))
        got = f(x, blocks, bias, dy)
        for name, true in truth.items():
            testing.assert_as_close_as_dense(got[name], true, dense[name], name)
    return {"ok": True}


def _pattern(block: int, m: int, kind: str) -> BlockPattern:
    """Blocks at random, which reach beyond the matrix; or single entries, whose indices have the dtype `kind`."""
    if block > 1:
        return BlockPattern.random(jax.random.key(m), (5 * block - 3, 7 * block - 5), density=0.4, block=block)
    entries = next(case.pattern for case in testing.CASES if case.name == "empty rows and columns, unstructured")
    return dataclasses.replace(entries, row_index=entries.row_index.astype(kind))


def _poison(size: int) -> None:
    """Fills memory that the next results will take with NaN: what a kernel leaves out then shows."""
    for _ in range(4):
        jnp.full(max(size, 1), jnp.nan, jnp.float32).block_until_ready().delete()


# ---- sanitize ---------------------------------------------------------------------------------------


def _sanitizers(args) -> Iterator[Step]:
    for tool in ("memcheck", "racecheck", "synccheck"):
        yield f"sanitize {tool}", functools.partial(_sanitize, tool, args.dry_run)


def _sanitize(tool: str, dry_run: bool) -> dict:
    """What compute-sanitizer finds in the checks of the smallest batch."""
    if dry_run or not shutil.which("compute-sanitizer"):
        return {"skipped": "a dry run" if dry_run else "compute-sanitizer is not on the PATH"}
    code = "import benchmarks.gpu as g; g._small_checks()"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    except subprocess.TimeoutExpired:
        return {"skipped": "took longer than 500 s"}
    return {"ok": True} if done.returncode == 0 else {"error": (done.stdout + done.stderr)[-3000:]}


def _small_checks() -> None:
    """One of every kernel that runs here; raises for a wrong result."""
    cases = [(name, block, "random") for name in ("mosaic", "triton") for block in (32, 64)]
    for backend, block, kind in [*cases, ("mosaic", 64, "block-diagonal"), ("triton", 1, "uint16")]:
        if _backends.why_not(backend, "spmm", "bfloat16", (block, block)) is None:
            _check(backend, block, "bfloat16", 33, kind)


# ---- tune -------------------------------------------------------------------------------------------


def _tunings(args) -> Iterator[Step]:
    if _backends_here(args, "bfloat16", (1, 1)):
        size, layers = (64, 2) if args.dry_run else (4096, 32)
        for m in (4,) if args.dry_run else (1, 4, 16):
            yield f"tune entries batch {m}", functools.partial(_tune_entries, m, size, layers)
    if not args.dry_run and _backends.why_not("mosaic", "spmm", "bfloat16", (64, 64)):
        return
    blocks, batches, size = ((64,), (64,), 256) if args.dry_run else ((128, 64, 32, 16), (128, 1024, 8192), 4096)
    for block in blocks:
        for m in batches:
            for kernel in ("gather", "sample"):
                step = functools.partial(_tune, kernel, block, m, size, args.dry_run)
                yield f"tune {configs.key(kernel, m, block, block)}", step


def _tune(kernel: str, block: int, m: int, size: int, dry_run: bool) -> dict:
    """Times every candidate at density 0.25 and keeps the best in the table of this kind of GPU."""
    pattern = BlockPattern.random(jax.random.key(0), (size, size), density=0.25, block=block)
    x, blocks = testing.normal(0, (m, size), jnp.bfloat16), testing.normal(1, pattern.values_shape, jnp.bfloat16)
    times, lines, device = {}, size // block, describe()
    if kernel == "gather":
        candidates = list(configs.candidates_for_gather(m, size, block, block, lines))
    else:
        candidates = list(configs.candidates_for_sample(block, block, pattern.nnzb, lines))
    if dry_run:
        return {"candidates": [c._asdict() for c in candidates], "skipped": "a dry run"}
    from pallas_kernels.mosaic import gather, sample

    for config in candidates:
        if kernel == "gather":
            f = lambda x, w, index, c=config: gather.gather(  # noqa: E731
                x, w, lines_of(index, False), None, c, device, transposed=False, activation=None
            )
            run = functools.partial(jax.jit(f), x, blocks, pattern.index)
        else:
            f = lambda x, dy, index, c=config: sample.sample(x, dy, index, (block, block), c, device)  # noqa: E731
            run = functools.partial(jax.jit(f), x, x, pattern.index)
        timed = _result(lambda run=run: _median_ms({"ms": run}))
        times |= {json.dumps(config._asdict()): timed["ms"]} if "ms" in timed else {}
    best = min(times, key=times.__getitem__)
    table = json.loads(configs.MEASURED.read_text()) if configs.MEASURED.exists() else {}
    table.setdefault(device.kind, {})[configs.key(kernel, m, block, block)] = json.loads(best)
    _write(configs.MEASURED, table)
    return {"ms": times, "best": best}


def _tune_entries(m: int, size: int, layers: int) -> dict:
    """Times tiles of single entries at density 0.1; what is best at most batches belongs into `entries.NUMBERS`."""
    from pallas_kernels.triton import entries

    pattern, interpret = BlockPattern.random(jax.random.key(0), (size, size), density=0.1), not describe().kind
    lines = lines_of(pattern.index, False)._replace(slot=None)
    x, values = testing.normal(0, (m, size), jnp.bfloat16), testing.normal(1, pattern.values_shape, jnp.bfloat16)
    values /= pattern.fan_in**0.5
    how = {"bias": None, "activation": None, "interpret": interpret}
    runs = {
        str(n): _gpu_cells.chain(layers, x, functools.partial(entries.gather, **how, numbers=n), values, lines)
        for n in (512, 1024, 2048, 4096)
    }
    times = {n: ms / layers for n, ms in _median_ms(runs).items()}
    return {"ms": times, "best": min(times, key=times.__getitem__)}


# ---- time -------------------------------------------------------------------------------------------


def _timings(args) -> Iterator[Step]:
    for cell in _gpu_cells.grid(args.dry_run):
        yield f"time {cell.name}", functools.partial(_time, cell, _backends_here(args, cell.dtype, cell.block))


def _time(cell: _gpu_cells.Cell, backends: list[str]) -> dict:
    """Milliseconds that each contender takes for a layer, why others don't run, and what an H100 allows at best."""
    ready, notes = _gpu_cells.contenders(cell, backends), {}
    try:
        ready |= _gpu_torch.contenders(cell)
    except Exception as refused:
        notes["torch"] = _said(refused)
    for name, run in list(ready.items()):
        try:
            jax.block_until_ready(run())
        except Exception as refused:
            notes[name] = _said(refused)
            del ready[name]
    ms = {name: ms / cell.layers for name, ms in _median_ms(ready).items()}
    return {"ms": ms, "notes": notes, "predicted_limit_ms": _gpu_limits.predicted_ms(cell)}


def _median_ms(runs: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """The median of several rounds in turns, each of as many runs as take about 20 ms."""
    repeats = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, min(200, int(20 / max(_once_ms(run, 1), 1e-3))))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_once_ms(run, repeats[name]))
    return {name: float(np.median(ms)) for name, ms in times.items()}


def _once_ms(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    results = [run() for _ in range(repeats)][-1]
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - start) / repeats


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


def _short(result) -> str:
    text = {k: round(v, 4) for k, v in result["ms"].items()} if "ms" in result else result
    return str(text)[:300]


if __name__ == "__main__":
    main()
