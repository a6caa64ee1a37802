"""What `gpu.py` times: the grid, the configurations worth trying, and what the profiler counts in the worst kernels."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp

from benchmarks import _gpu_cells, _gpu_limits, _gpu_lost, _gpu_process, _gpu_torch
from benchmarks._gpu_checks import backends_here
from benchmarks._gpu_report import least_of_ours
from benchmarks._gpu_run import Program, Result, Step, beside, compiled, median_ms, said
from jaxsparse import BlockPattern, sddmm, spmm, testing
from pallas_kernels._device import describe
from pallas_kernels._lines import lines_of
from pallas_kernels.mosaic import configs

COUNTERS = (
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)


# ---- time -------------------------------------------------------------------------------------------


def timings(dry_run: bool, cells: Iterable[_gpu_cells.Cell], steps: Mapping[str, Result]) -> Iterator[Step]:
    for cell in cells:
        backends, lost = backends_here(dry_run, cell.dtype, cell.block), _gpu_lost.left_out(cell.family, steps)
        sides = [[name for name in backends if (name in lost) is out] for out in (False, True)]
        yield Step(f"time {cell.name}", functools.partial(_time, cell, *sides), seconds=30)


def _time(cell: _gpu_cells.Cell, backends: list[str], left_out: list[str]) -> Callable[[], Result]:
    """Milliseconds that each contender takes for a layer, why others don't run, and what an H100 allows at best. Ours
    are not timed where they differ from XLA's: the checks before are of other sizes, so of other kernels."""
    ready, notes = compiled(_gpu_cells.contenders(cell, backends))
    if plain := ready.get("ours (xla)"):
        off = jax.jit(_off).lower(plain.results, plain.results).compile()
    try:
        ready |= _gpu_torch.contenders(cell)
    except Exception as refused:
        notes["torch"] = said(refused)

    def run() -> Result:
        want = plain() if plain else None
        for name, start in list(ready.items()):
            _gpu_process.doing(f"of {name}")
            try:
                got = jax.block_until_ready(start())
                if want is not None and name.startswith("ours"):
                    _refuse(float(off(got, want)), 2**-4 if cell.layers > 1 else 2**-6)  # as roundings add up
            except Exception as refused:
                if not _gpu_process.answers():
                    raise RuntimeError(f"{name} left no GPU to its process: {said(refused)}") from refused
                notes[name] = said(refused)
                del ready[name]
        ms = {name: ms / cell.layers for name, ms in median_ms(ready).items()}
        result = {"ms": ms, "notes": notes, "predicted_limit_ms": _gpu_limits.predicted_ms(cell)}
        return result | ({"left out": left_out} if left_out else {})

    return run


def _off(got, want) -> jax.Array:
    """The largest difference of two results, as a share of the largest number."""
    wide = [[a.astype(jnp.float32) for a in jax.tree.leaves(results)] for results in (got, want)]
    return jnp.stack([jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip(*wide, strict=True)]).max()


def _refuse(off: float, most: float) -> None:
    if not off <= most:  # NaN is not
        raise AssertionError(f"off by {off:.3g} of the largest number")


# ---- tune -------------------------------------------------------------------------------------------


def tunings(dry_run: bool) -> Iterator[Step]:
    if backends_here(dry_run, "bfloat16", (1, 1)):
        size, layers = (64, 2) if dry_run else (4096, 32)
        for m in (4,) if dry_run else (1, 4, 16):
            yield Step(f"tune entries batch {m}", functools.partial(_tune_entries, m, size, layers))
    if not dry_run and "mosaic" not in backends_here(dry_run, "bfloat16", (64, 64)):
        return
    blocks, batches, size = ((64,), (64,), 256) if dry_run else ((128, 64, 32, 16), (128, 1024, 8192), 4096)
    cells = [(kernel, block, m, 0.25) for block in blocks for m in batches for kernel in ("gather", "sample")]
    if not dry_run:  # where the ways to share what is loaded differ by density
        cells += [("gather", block, 8192, density) for block in (64, 32) for density in (0.1, 0.5)]
    for kernel, block, m, density in cells:
        build = functools.partial(_tune, kernel, block, m, density, size, dry_run)
        yield Step(f"tune {configs.key(kernel, m, density, block, block)}", build)


def _tune(kernel: str, block: int, m: int, density: float, size: int, dry_run: bool) -> Callable[[], Result]:
    """What is built times every candidate that gives what XLA does."""
    pattern = BlockPattern.random(jax.random.key(0), (size, size), density=density, block=block)
    x, blocks = testing.normal(0, (m, size), jnp.bfloat16), testing.normal(1, pattern.values_shape, jnp.bfloat16)
    lines, device, programs = size // block, describe(), {}
    if kernel == "gather":
        plain = Program(functools.partial(spmm, backend="xla"), x, blocks, pattern)
        candidates = list(configs.candidates_for_gather(m, size, block, block, lines, pattern.nnzb))
    else:
        plain = Program(functools.partial(sddmm, backend="xla"), x, x, pattern)
        candidates = list(configs.candidates_for_sample(m, block, block, pattern.nnzb, lines, lines))
    if dry_run:
        return lambda: {"candidates": [c._asdict() for c in candidates], "skipped": "a dry run"}
    from pallas_kernels.mosaic import multiply

    for config in candidates:
        if kernel == "gather":
            f = lambda x, w, index, c=config: multiply.multiply(  # noqa: E731
                x, w, lines_of(index, False), None, c, device, transposed=False, activation=None
            )
        else:
            f = lambda x, dy, index, c=config: multiply.sample(x, dy, index, (block, block), c, device)  # noqa: E731
        program = Program(f, x, blocks if kernel == "gather" else x, pattern.index)
        programs[json.dumps(config._asdict())] = program
    programs, notes = compiled(programs)
    plain.compile()

    def run() -> Result:
        want, right = plain(), {}
        for name, program in programs.items():
            _gpu_process.doing(f"of {name}")
            try:
                _refuse(float(_off(program(), want)), 2**-6)
                right[name] = program
            except AssertionError as wrong:
                notes[name] = said(wrong)
        times = median_ms(right)
        best, first = min(times, key=times.__getitem__), next(iter(times))
        faster = times[first] / times[best] > 1.03  # than what was taken so far
        again = sorted(_timed_with({configs.key(kernel, m, density, block, block)})) if faster else []
        return {"ms": times, "notes": notes, "best": best, "others": again}

    return run


def retimed() -> set[str]:
    """The steps of the first call that tuning may give another kernel."""
    return _timed_with({step.name.removeprefix("tune ") for step in tunings(False)})


def _timed_with(keys: set[str]) -> set[str]:
    """The steps that time blocks with the configurations of these keys."""
    return {
        f"time {cell.name}"
        for cell in _gpu_cells.grid(toy=False)
        for kernel in {"forward": ("gather",), "dX": ("gather",), "dW": ("sample",), "step": ("gather", "sample")}[
            cell.mode
        ]
        if cell.family == "blocks" and configs.key(kernel, cell.batch, cell.density, *cell.block) in keys
    }


def configure_by(kind: str, steps: Mapping[str, Result]) -> None:
    """Keeps the configurations that were the best in the table of this kind of GPU."""
    names = {name: name.removeprefix("tune ") for name in steps if name.startswith(("tune gather", "tune sample"))}
    best = {key: json.loads(steps[name]["best"]) for name, key in names.items() if "best" in steps[name]}
    if best:
        configs.write(kind, best)


def _tune_entries(m: int, size: int, layers: int) -> Callable[[], Result]:
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
    runs, notes = compiled(runs)

    def run() -> Result:
        times = {n: ms / layers for n, ms in median_ms(runs).items()}
        return {"ms": times, "notes": notes, "best": min(times, key=times.__getitem__)}

    return run


# ---- counters ---------------------------------------------------------------------------------------


def worst(steps: Mapping[str, Result], count: int = 2) -> list[tuple[_gpu_cells.Cell, str]]:
    """The cells and back ends of ours that take the longest beside what was predicted at best, one of each back end."""
    found = []
    for cell in _gpu_cells.grid(toy=False):
        result = steps.get(f"time {cell.name}", {})
        limit = least_of_ours(result.get("predicted_limit_ms", {}))
        for backend in ("mosaic", "triton"):
            ms = result.get("ms", {}).get(f"ours ({backend})")
            if ms and limit:
                found.append((ms / limit, backend, cell))
    slowest = sorted(found, key=lambda f: -f[0])
    first = {backend: cell for _, backend, cell in reversed(slowest)}
    return [(cell, backend) for backend, cell in first.items()][:count]


def counted(cell: _gpu_cells.Cell, backend: str) -> Callable[[], Result]:
    """What the profiler counts in one run of a kernel."""
    if not shutil.which("ncu"):
        return lambda: {"skipped": "ncu is not on the PATH"}
    code = f"import benchmarks._gpu_timings as t; t.once({cell.name!r}, {backend!r})"
    ours = ("--kernel-name", "regex:jaxsparse", "--launch-count", "3")  # not what makes operands: as many as a step has
    options = ("--metrics", ",".join(COUNTERS), "--csv", *ours)
    return lambda: beside("ncu", *options, sys.executable, "-c", code)()


def once(name: str, backend: str) -> None:
    """Runs one contender of a cell."""
    cell = next(cell for cell in _gpu_cells.grid(toy=False) if cell.name == name)
    program = _gpu_cells.contenders(cell, [backend])[f"ours ({backend})"]
    program.compile()
    jax.block_until_ready(program())
