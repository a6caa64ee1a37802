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

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
_FASTCALL = 0x80  # METH_FASTCALL of Python's stable ABI
_TEAM = ("torch_get_num_threads", "torch_parallel_for")  # C symbols of libtorch since 2.10
_POINTER, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[int, list[Any]]] = {  # how many tensors, and what follows them
    "spmm": (7, [_I64, _I64, _I64, _I64, _INT, _I64]),
    "sddmm": (5, [_I64, _I64, _I64, _I64]),
    "spmm_backward": (11, [_I64, _I64, _I64, _I64, _INT]),
    "block_diag_matmul": (4, [_INT, _I64]),
    "block_diag_outer": (3, []),
    "block_diag_backward": (6, [_INT]),
}


class Kernels:
    """The kernels for one kind of tensor. An absent tensor is None; results are written, not returned.

    Args:
      torch: the module torch, or None for NumPy arrays.
      library: another build of the kernels than the installed one.
    Raises:
      NotImplementedError: where `why_not(torch)` gives a reason.
      ValueError: in a call, for operands that do not fit, with the numbers.
    """

    _spmm: Any
    _sddmm: Any
    _spmm_backward: Any
    _block_diag_matmul: Any
    _block_diag_outer: Any
    _block_diag_backward: Any

    def __init__(self, torch: Any = None, library: ctypes.CDLL | None = None):
        if reason := why_not(torch):
            raise NotImplementedError(f"the cpu kernels can't be called directly: {reason}")
        library = library or opened()
        if torch:
            library.jaxsparse_cpu_builtin_caller(ctypes.byref(_of_torch(torch)))
        for name, (tensors, sizes) in _SIGNATURES.items():
            setattr(self, f"_{name}", _builtin(library, name) if torch else _on_arrays(library, name, tensors, sizes))

    def spmm(self, x, values, lines: Sequence, bias, y, sizes, transposed: bool, activation: str | None = None) -> None:
        """Writes y = activation(x W + bias), or with W^T in place of W.

        Args:
          x, y: [..., features].
          values: [nnzb, i, o], or [nnz] for single entries.
          lines: int32 pointers, index and order of the matrix by columns (by rows for W^T); the order is None where
            it is that of `values`. Then, for x of one row and single entries, the index may be uint16, which is 1.2 to
            1.4 times as fast where it comes from memory.
          bias: one number per output, or None.
          sizes: (in, out, i, o) of the stored matrix.
        """
        self._spmm(x, values, *lines, bias, y, *sizes, transposed, _ACTIVATIONS[activation])

    def sddmm(self, x, dy, lines: Sequence, values, sizes) -> None:
        """Writes x^T dy at the stored entries to `values`; `lines` are pointers and index by columns."""
        self._sddmm(x, dy, *lines, values, *sizes)

    def spmm_backward(self, x, dy, values, index: Sequence, dx, dvalues, dbias, sizes, transposed: bool) -> None:
        """Writes the gradients of y = x W + bias, or with W^T in place of W; those that are None are not wanted.

        Both gradients of single entries come from one pass over dy.

        Args:
          index: col_ptr, row_index, row_ptr, col_index and order of a pattern, int32.
          dbias: float32 or float64, one number per output.
        """
        self._spmm_backward(x, dy, values, *index, dx, dvalues, dbias, *sizes, transposed)

    def block_diag_matmul(self, x, blocks, bias, y, transposed: bool, activation: str | None = None) -> None:
        """Writes slice n of x times block n, or times its transpose, to slice n of y."""
        self._block_diag_matmul(x, blocks, bias, y, transposed, _ACTIVATIONS[activation])

    def block_diag_outer(self, x, dy, blocks) -> None:
        """Writes the products of the slices of x and of dy to `blocks`."""
        self._block_diag_outer(x, dy, blocks)

    def block_diag_backward(self, x, dy, blocks, dx, dblocks, dbias, transposed: bool) -> None:
        """Writes the gradients of `block_diag_matmul`; those that are None are not wanted."""
        self._block_diag_backward(x, dy, blocks, dx, dblocks, dbias, transposed)


def why_not(torch: Any = None) -> str | None:
    """Returns why the kernels can't be called directly on this torch's tensors (on arrays), or None when they can."""
    if torch is not None and (missing := _missing_in(torch)):
        return f"torch {torch.__version__} has no {missing}: torch 2.10 and newer have it on Linux and macOS"
    return why_not_opened()


def isa() -> str:
    """The instruction set in use: amx (AVX-512 with tile registers), avx512, avx2 or portable."""
    return opened().jaxsparse_cpu_isa().decode()


class _Caller(ctypes.Structure):
    """Whose tensors and threads a call uses; direct.cc says what each field is."""

    _fields_ = [
        *[(name, _POINTER) for name in ("borrow", "none", "threads", "parallel_for", "unlock", "lock")],
        *[(name, _POINTER) for name in ("number", "keep", "refuse", "error")],
    ]


class _Exchange(ctypes.Structure):
    """DLPack's table of functions, version 1."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *[(name, _POINTER) for name in ("previous", "allocate", "own", "give", "borrow", "stream")],
    ]


@functools.cache
def _of_torch(torch: Any) -> _Caller:
    team, python = [getattr(_torch_library(torch), name) for name in _TEAM], ctypes.pythonapi
    lock = [python.PyEval_SaveThread, python.PyEval_RestoreThread]
    functions = [*team, *lock, python.PyLong_AsLongLong, python.Py_IncRef, python.PyErr_SetString]
    pointers = [ctypes.cast(f, _POINTER).value for f in functions]
    return _Caller(_exchange(torch).borrow, id(None), *pointers, id(ValueError))


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


class _Method(ctypes.Structure):
    """How Python describes a builtin function, PyMethodDef."""

    _fields_ = [("name", ctypes.c_char_p), ("function", _POINTER), ("flags", _INT), ("doc", ctypes.c_char_p)]


@functools.cache
def _method(library: ctypes.CDLL, name: str) -> _Method:
    function = ctypes.cast(getattr(library, f"jaxsparse_cpu_builtin_{name}"), _POINTER)
    return _Method(name.encode(), function, _FASTCALL, None)  # kept, as the builtin function points to it


def _builtin(library: ctypes.CDLL, name: str) -> Any:
    """A kernel on torch's tensors."""
    new = ctypes.pythonapi["PyCFunction_NewEx"]
    new.restype, new.argtypes = ctypes.py_object, [_POINTER, _POINTER, _POINTER]
    return new(ctypes.addressof(_method(library, name)), None, None)


def _on_arrays(library: ctypes.CDLL, name: str, tensors: int, sizes: list[Any]) -> Any:
    """A kernel on NumPy's arrays."""
    function, alone = library[f"jaxsparse_cpu_direct_{name}"], _Caller()
    function.restype, function.argtypes = ctypes.c_char_p, [_POINTER, *[_POINTER] * tensors, *sizes]

    def call(*arguments) -> None:
        kept = [None if a is None else a.__dlpack__() for a in arguments[:tensors]]
        pointers = [None if capsule is None else _capsule_pointer()(capsule, b"dltensor") for capsule in kept]
        wrong = function(ctypes.addressof(alone), *pointers, *arguments[tensors:])
        if wrong is not None:
            raise ValueError(f"cpu_kernels.{name}: {wrong.decode()}.")

    return call


@functools.cache
def _capsule_pointer() -> Any:
    function = ctypes.pythonapi["PyCapsule_GetPointer"]
    function.restype, function.argtypes = _POINTER, [ctypes.py_object, ctypes.c_char_p]
    return function
