"""What `gpu.py` finds out before it times anything: ceilings, right results, memory errors, torch beside JAX."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _gpu_torch
from benchmarks._gpu_run import Program, Result, Step, beside, median_ms
from jaxsparse import BlockPattern, _backends, block_diag_matmul, spmm, testing

DENSITIES = {"together": 0.4, "sharing x": 0.1}  # where Mosaic's programs hold several lines, and where they share x
BESIDE = 90  # seconds that a command beside the steps may take
_planned = contextvars.ContextVar("planned", default=False)


@contextlib.contextmanager
def as_on_an_h100():
    """Steps that are listed inside are those of a machine with that GPU. They are not to be built."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def backends_here(dry_run: bool, dtype: str, block) -> list[str]:
    named = ("interpret",) if dry_run else ("mosaic", "triton")
    return [name for name in named if _why_not(name, dtype, block) is None]


def _why_not(backend: str, dtype: str, block) -> str | None:
    if _planned.get():
        return _backends.BACKENDS[backend].why_not("spmm", dtype, block, "cuda", True)
    return _backends.why_not(backend, "spmm", dtype, block)


# ---- ceilings ---------------------------------------------------------------------------------------


def ceilings(n: int) -> Callable[[], Result]:
    """What this GPU reaches: bytes read and written by a copy, and a product of random bfloat16 numbers."""
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    programs = {"copy": Program(lambda a: a + 1, jnp.ones(n * n, jnp.float32))}
    programs["product"] = Program(lambda a: a @ a, a)
    for program in programs.values():
        program.compile()

    def run() -> Result:
        ms = median_ms(programs)
        return {"copy GB/s": 8e-6 * n * n / ms["copy"], "bfloat16 TFLOP/s": 2e-9 * n**3 / ms["product"], "ms": ms}

    return run


# ---- check ------------------------------------------------------------------------------------------


def checks(dry_run: bool) -> Iterator[Step]:
    blocks = (1, 16) if dry_run else (1, 16, 32, 64, 128)
    dtypes = ("float32",) if dry_run else ("bfloat16", "float16", "float32")
    if "mosaic" in backends_here(dry_run, "bfloat16", (64, 64)):
        for kind in DENSITIES:
            for block, dtype in ((32, "float16"), (64, "bfloat16")):
                name = f"check mosaic block {block} {kind} {dtype} batch 1000"
                yield Step(name, functools.partial(check, "mosaic", block, dtype, 1000, kind), seconds=20)
    for block in blocks:
        for dtype in dtypes:
            for backend in backends_here(dry_run, dtype, (block, block)):
                for m in (33,) if dry_run else (1, 100, 1000):
                    for kind in ("int32", "uint16") if block == 1 else ("random", "block-diagonal"):
                        name = f"check {backend} block {block} {kind} {dtype} batch {m}"
                        yield Step(name, functools.partial(check, backend, block, dtype, m, kind), seconds=20)


def check(backend: str, block: int, dtype: str, m: int, kind: str = "random") -> Callable[[], Result]:
    """What is built raises unless y, with gelu and without, and all gradients are as `testing` wants them."""
    if kind == "block-diagonal":
        pattern = BlockPattern.block_diagonal(3, (block, 2 * block))
        product = functools.partial(block_diag_matmul, backend=backend)
    else:
        pattern = _pattern(block, m, kind)
        product = lambda x, w, b, **how: spmm(x, w, pattern, b, backend=backend, **how)  # noqa: E731
    x, blocks, bias, dy = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, jnp.dtype(dtype))
    precise = "highest" if dtype == "float32" else None
    values = lambda *a: testing.value_and_gradients(product, *a) | {"gelu": product(*a[:3], activation="gelu")}  # noqa: E731
    with jax.default_matmul_precision(precise):
        program = Program(values, x, blocks, bias, dy)
        program.compile()
        poison = poisoned(program)
        truth = testing.true_products(x, blocks, bias, dy, pattern)
        dense = testing.dense_products(x, blocks, bias, dy, pattern)
        truth["gelu"] = jax.nn.gelu(truth["y"].astype(np.float32))
        dense["gelu"] = jax.nn.gelu(dense["y"].astype(np.float32)).astype(dtype)

    def run() -> Result:
        for spoilt in jax.tree.leaves(jax.block_until_ready(poison(program()))):
            spoilt.delete()
        got = program()
        for name, true in truth.items():
            testing.assert_as_close_as_dense(got[name], true, dense[name], name)
        return {"ok": True}

    return run


def _pattern(block: int, m: int, kind: str) -> BlockPattern:
    """Blocks at random, which reach beyond the matrix, in one of `DENSITIES` as many as those Mosaic kernels are taken
    for; or single entries, whose indices have the dtype `kind`."""
    if kind in DENSITIES:
        return BlockPattern.random(jax.random.key(m), (1024 - 3, 6144 - 5), density=DENSITIES[kind], block=block)
    if block > 1:
        return BlockPattern.random(jax.random.key(m), (5 * block - 3, 7 * block - 5), density=0.4, block=block)
    entries = next(case.pattern for case in testing.CASES if case.name == "empty rows and columns, unstructured")
    return dataclasses.replace(entries, row_index=entries.row_index.astype(kind))


def poisoned(program: Program) -> Callable:
    """What fills the memory of the program's results with NaN, and as much as it needs beside them. The next run finds
    the same places free and takes them again: what a kernel leaves out then shows."""
    temporary = program.compiled.memory_analysis().temp_size_in_bytes

    def spoil(results):
        return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), results), jnp.full(temporary // 4, jnp.nan)

    return jax.jit(spoil, donate_argnums=0, keep_unused=True).lower(program.results).compile()


# ---- sanitize ---------------------------------------------------------------------------------------


def sanitizers(dry_run: bool) -> Iterator[Step]:
    for tool in ("memcheck", "racecheck"):
        yield Step(f"sanitize {tool}", functools.partial(_sanitize, tool, dry_run))


def _sanitize(tool: str, dry_run: bool) -> Callable[[], Result]:
    """What compute-sanitizer finds in the checks of the smallest batch, which run while other steps are built."""
    if dry_run or not shutil.which("compute-sanitizer"):
        return lambda: {"skipped": "a dry run" if dry_run else "compute-sanitizer is not on the PATH"}
    code = "import benchmarks._gpu_checks as c; c.small_checks()"
    command = "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code
    return beside(*command, seconds=BESIDE)


def small_checks() -> None:
    """One of every kernel that runs here; raises for a wrong result."""
    cases = [(name, block, "random") for name in ("mosaic", "triton") for block in (32, 64)]
    for backend, block, kind in [*cases, ("mosaic", 64, "block-diagonal"), ("triton", 1, "uint16")]:
        if _backends.why_not(backend, "spmm", "bfloat16", (block, block)) is None:
            check(backend, block, "bfloat16", 33, kind)()


# ---- torch ------------------------------------------------------------------------------------------


def torch_tests(dry_run: bool) -> Callable[[], Result]:
    """The bridge's own tests on a GPU: streams, devices, memory, layers."""
    missing = next((name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None), None)
    if dry_run or missing:
        return lambda: {"skipped": "a dry run" if dry_run else f"{missing} is not installed here"}
    # Whatever the packages of that machine warn of is no error; tests that are all skipped are one.
    options = "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"
    tests = "-m", "pytest", *options, "tests/test_bridge_gpu.py"
    return beside(sys.executable, *tests, seconds=BESIDE, wanted=" passed")


def torch_overhead(dry_run: bool) -> Callable[[], Result]:
    """Milliseconds of forward and backward of a tiny layer of ours, and of torch's, from the host."""
    if dry_run or importlib.util.find_spec("torch") is None:
        return lambda: {"skipped": "a dry run" if dry_run else "torch is not installed here"}
    import torch

    from torch_bridge import SparseLinear

    x = torch.randn(8, 64, device="cuda", requires_grad=True)
    layers = {"ours": SparseLinear(64, 64, 0.2, device="cuda"), "nn.Linear": torch.nn.Linear(64, 64, device="cuda")}
    runs = {name: _gpu_torch.started(torch, lambda f=f: f(x).sum().backward()) for name, f in layers.items()}
    return lambda: {"ms": median_ms(runs)}
