"""The C++ kernels on a team of threads that the test makes: how many there are never shows in a result."""

import ctypes
import functools
import threading

import numpy as np
import pytest

import cpu_kernels as ck
from cpu_kernels import direct

if direct.why_not():
    pytest.skip(f"the kernels can't be called directly: {direct.why_not()}", allow_module_level=True)

RUN = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
COUNT = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_uint32))
TOGETHER = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, RUN, ctypes.c_void_p)


class Team:
    """Threads of Python, as a caller of kernels has them; `most` is how many a call has used so far."""

    def __init__(self, size: int):
        self.size, self.most = size, 0
        self._kept = COUNT(self._threads), TOGETHER(self._parallel_for)
        threads, parallel_for = (ctypes.cast(callback, ctypes.c_void_p).value for callback in self._kept)
        self.caller = direct._Caller(threads=threads, parallel_for=parallel_for)

    def _threads(self, count) -> int:
        count[0] = self.size
        return 0

    def _parallel_for(self, begin, end, grain, run, work) -> int:
        self.most = max(self.most, end - begin)
        team = [threading.Thread(target=run, args=(k, k + 1, work)) for k in range(begin, end)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        return 0


@functools.cache
def patterned(shape, block, density):
    """The five arrays of a random pattern, and the shape of its values."""
    (i, o), rng = block, np.random.default_rng(0)
    mask = rng.random((-(-shape[0] // i), -(-shape[1] // o))) < density
    cols, rows = np.nonzero(mask.T)
    order = np.lexsort((cols, rows))
    pointers = [np.append(0, np.cumsum(mask.sum(axis))) for axis in (0, 1)]
    index = [a.astype(np.int32) for a in (pointers[0], rows, pointers[1], cols[order], order)]
    return index, (len(rows),) if block == (1, 1) else (len(rows), i, o)


def sparse_products(kernels, rows, shape, block, density):
    index, values_shape = patterned(shape, block, density)
    x, dy, w, bias = numbers((rows, shape[0]), (rows, shape[1]), values_shape, (shape[1],))
    y, dx, dw, dx_too, dw_too, db = (np.empty_like(a) for a in (dy, x, w, x, w, bias))
    sizes = (*shape, *block)
    kernels.spmm(x, w, (*index[:2], None), bias, y, sizes, False, "gelu")
    kernels.spmm(dy, w, index[2:], None, dx, sizes, True)
    kernels.sddmm(x, dy, index[:2], dw, sizes)
    kernels.spmm_backward(x, dy, w, index, dx_too, dw_too, db, sizes, False)
    found = {"y": y, "dx": dx, "dW": dw, "dx together": dx_too, "dW together": dw_too, "db": db}
    if rows == 1:
        found["y, 16 bits"] = np.empty_like(dy)
        lines = index[0], index[1].astype(np.uint16), None
        kernels.spmm(x, w, lines, bias, found["y, 16 bits"], sizes, False, "gelu")
    return found


def diagonal_products(kernels, rows, sizes):
    n, i, o = sizes
    x, dy, w = numbers((rows, n * i), (rows, n * o), sizes)
    y, dx, dw = (np.empty_like(a) for a in (dy, x, w))
    kernels.block_diag_matmul(x, w, None, y, False)
    kernels.block_diag_matmul(dy, w, None, dx, True)
    kernels.block_diag_outer(x, dy, dw)
    return {"y": y, "dx": dx, "dW": dw}


@functools.cache
def numbers(*shapes):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    "products, sizes",
    [
        (sparse_products, (300, (700, 600), (1, 1), 0.15)),
        (sparse_products, (1, (1600, 1500), (1, 1), 0.9)),
        (sparse_products, (200, (512, 768), (16, 16), 0.2)),
        (sparse_products, (400, (300, 410), (3, 5), 0.3)),
        (diagonal_products, (200, (6, 96, 80))),
    ],
    ids=["single entries", "one row", "blocks", "short blocks", "diagonal blocks"],
)
@pytest.mark.parametrize("isa", ["portable", "best"])
def test_a_result_has_the_same_bits_for_every_number_of_threads(products, sizes, isa, monkeypatch):
    before = ck.isa()
    if isa != "best":
        ck.use_isa(isa)
    try:
        alone = products(direct.Kernels(), *sizes)
        for size in (2, 3, 8):
            team = Team(size)
            monkeypatch.setattr(direct, "_Caller", lambda: team.caller)  # noqa: B023
            together = products(direct.Kernels(), *sizes)
            monkeypatch.undo()
            assert team.most > 1, "one thread did it all"
            for name, value in alone.items():
                assert np.array_equal(value, together[name]), f"{name} on {size} threads"
    finally:
        ck.use_isa(before)
