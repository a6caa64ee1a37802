"""The kernels without XLA: on tensors of torch or arrays of NumPy, in their own memory, on the caller's threads.

Operands cross by DLPack. A torch tensor does so through the exchange table that torch has since 2.10, and the tasks of
a kernel then run on torch's own threads; a NumPy array does so by `__dlpack__`, and its caller works alone. Results
are written into arrays that the caller made. Everything is checked in C++: shapes, dtypes, contiguity, index ranges.
Neither JAX nor torch is imported here.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from cpu_kernels._library import opened, why_not_opened

_ACTIVATIONS = (None, "relu", "gelu", "silu")
_TEAM = ("torch_get_num_threads", "torch_parallel_for")  # C symbols of libtorch since 2.10
_POINTER, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[int, list[Any]]] = {  # how many tensors, and what follows them
    "spmm": (7, [_I64, _I64, _I64, _I64, _INT, _I64]),
    "sddmm": (5, [_I64, _I64, _I64, _I64]),
    "spmm_grads": (8, [_I64, _I64]),
    "block_diag_matmul": (4, [_INT, _I64]),
    "block_diag_outer": (3, []),
}


class Kernels:
    """The five kernels for one kind of tensor. An absent tensor is None; results are written, not returned.

    Args:
      torch: the module torch, or None for NumPy arrays.
      library: another build of the kernels than the installed one.
    Raises:
      NotImplementedError: where `why_not(torch)` gives a reason.
      ValueError: in a call, for operands that do not fit, with the numbers.
    """

    _spmm: Any
    _sddmm: Any
    _spmm_grads: Any
    _block_diag_matmul: Any
    _block_diag_outer: Any

    def __init__(self, torch: Any = None, library: ctypes.CDLL | None = None):
        if reason := why_not(torch):
            raise NotImplementedError(f"the cpu kernels can't be called directly: {reason}")
        self._caller = _of_torch(torch) if torch else _Caller()
        self._of = ctypes.addressof(self._caller)
        for name, (tensors, sizes) in _SIGNATURES.items():
            setattr(self, f"_{name}", _function(library or opened(), name, tensors, sizes, torch is not None))

    def spmm(self, x, values, lines: Sequence, bias, y, sizes, transposed: bool, activation: str | None = None) -> None:
        """Writes y = activation(x W + bias), or with W^T in place of W.

        Args:
          x, y: [..., features].
          values: [nnzb, i, o], or [nnz] for single entries.
          lines: int32 pointers, index and order of the matrix by columns (by rows for W^T); the order is None where
            it is that of `values`.
          bias: one number per output, or None.
          sizes: (in, out, i, o) of the stored matrix.
        """
        number = _ACTIVATIONS.index(activation)
        _check("spmm", self._spmm(self._of, x, values, *lines, bias, y, *sizes, transposed, number))

    def sddmm(self, x, dy, lines: Sequence, values, sizes) -> None:
        """Writes x^T dy at the stored entries to `values`; `lines` are pointers and index by columns."""
        _check("sddmm", self._sddmm(self._of, x, dy, *lines, values, *sizes))

    def spmm_grads(self, x, dy, values, lines: Sequence, dx, dvalues, sizes) -> None:
        """Writes dx = dy W^T and dvalues = x^T dy of single entries in one pass; `lines` are those by rows."""
        _check("spmm_grads", self._spmm_grads(self._of, x, dy, values, *lines, dx, dvalues, *sizes[:2]))

    def block_diag_matmul(self, x, blocks, bias, y, transposed: bool, activation: str | None = None) -> None:
        """Writes slice n of x times block n, or times its transpose, to slice n of y."""
        number = _ACTIVATIONS.index(activation)
        _check("block_diag_matmul", self._block_diag_matmul(self._of, x, blocks, bias, y, transposed, number))

    def block_diag_outer(self, x, dy, blocks) -> None:
        """Writes the products of the slices of x and of dy to `blocks`."""
        _check("block_diag_outer", self._block_diag_outer(self._of, x, dy, blocks))


def why_not(torch: Any = None) -> str | None:
    """Returns why the kernels can't be called directly on this torch's tensors (on arrays), or None when they can."""
    if torch is not None and (missing := _missing_in(torch)):
        return f"torch {torch.__version__} has no {missing}: torch 2.10 and newer have it on Linux and macOS"
    return why_not_opened()


def isa() -> str:
    """The instruction set in use: avx512, avx2 or portable."""
    return opened().jaxsparse_cpu_isa().decode()


class _Caller(ctypes.Structure):
    """Whose tensors and threads a call uses; direct.cc says what each field is."""

    _fields_ = [(name, _POINTER) for name in ("borrow", "none", "threads", "parallel_for", "unlock", "lock")]


class _Exchange(ctypes.Structure):
    """DLPack's table of functions, version 1."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *[(name, _POINTER) for name in ("previous", "allocate", "own", "give", "borrow", "stream")],
    ]


def _of_torch(torch: Any) -> _Caller:
    team = [getattr(_torch_library(torch), name) for name in _TEAM]
    lock = [ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread]
    return _Caller(_exchange(torch).borrow, id(None), *[ctypes.cast(f, _POINTER).value for f in (*team, *lock)])


def _missing_in(torch: Any) -> str | None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__") or _exchange(torch).major != 1:
        return "DLPack exchange table"
    library = _torch_library(torch)
    return next((name for name in _TEAM if library is None or not hasattr(library, name)), None)


def _exchange(torch: Any) -> _Exchange:
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    return _Exchange.from_address(_capsule_pointer()(capsule, b"dlpack_exchange_api"))


@functools.cache
def _torch_library(torch: Any) -> ctypes.CDLL | None:
    folder = pathlib.Path(torch.__file__).parent / "lib"
    path = next((p for p in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib") if p.exists()), None)
    return None if path is None else ctypes.CDLL(str(path))


def _function(library: ctypes.CDLL, name: str, tensors: int, sizes: list[Any], for_torch: bool) -> Any:
    """A kernel of the library. Python's lock is held on entry where tensors are Python's objects."""
    kind, tensor = (ctypes.PyDLL, ctypes.py_object) if for_torch else (ctypes.CDLL, _POINTER)
    function = getattr(kind(library._name), f"jaxsparse_cpu_direct_{name}")
    function.restype, function.argtypes = ctypes.c_char_p, [_POINTER, *[tensor] * tensors, *sizes]
    if for_torch:
        return function

    def on_arrays(caller: int, *arguments):
        kept = [None if a is None else a.__dlpack__() for a in arguments[:tensors]]
        pointers = [None if capsule is None else _capsule_pointer()(capsule, b"dltensor") for capsule in kept]
        return function(caller, *pointers, *arguments[tensors:])

    return on_arrays


@functools.cache
def _capsule_pointer() -> Any:
    function = ctypes.pythonapi["PyCapsule_GetPointer"]
    function.restype, function.argtypes = _POINTER, [ctypes.py_object, ctypes.c_char_p]
    return function


def _check(name: str, wrong: bytes | None) -> None:
    if wrong is not None:
        raise ValueError(f"cpu_kernels.{name}: {wrong.decode()}.")
