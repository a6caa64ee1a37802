"""What programs of `torch.export` need to run where this library is not.

    program = torch.export.export(model, (x,)).run_decompositions(exporting.decompositions())
    torch.export.save(program, path)    # or torch.onnx.export(program), or aoti_compile_and_package(program)

`torch.onnx.export(model, ..)` needs no help, and `torch_bridge.densify(model)` before any export is the other way: the
program then holds dense weights, and does not expand them in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_bridge import (
    _portable,
    torch_ops,  # noqa: F401 (registers torch.ops.jaxsparse)
)
from torch_bridge._matrix import Diagonal, Sparse


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The products of the layers by torch's own operators, for `ExportedProgram.run_decompositions`.

    A sparse weight stays stored as it is, and is expanded to a dense one, of O(in * out), in every call, unless what
    runs the program folds constants. Nothing else is decomposed.
    """
    ops = torch.ops.jaxsparse
    return {ops.spmm.default: _spmm, ops.block_diag_matmul.default: _block_diag_matmul}


def _spmm(x, values, bias, index, sizes, transposed, activation=None):
    return _portable.multiply(Sparse(tuple(index), tuple(sizes), transposed), x, values, bias, activation)


def _block_diag_matmul(x, blocks, bias, transposed, activation=None):
    return _portable.multiply(Diagonal(tuple(blocks.shape), transposed), x, blocks, bias, activation)
