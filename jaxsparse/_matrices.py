"""The weight matrices of a checkpoint, whoever wrote it: `read`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import checkpoint, files
from jaxsparse._indices import Index
from jaxsparse.files import SparseMatrix
from jaxsparse.formats import BlockPattern

_ORBAX = "_METADATA"  # in the folder of every tree that Orbax saved
_NO_WEIGHTS = {"opt_state", "optimizer", "optimizer_state", "mu", "nu", "trace"}  # moments have the shapes of weights
_WEIGHTS = ("kernel", "weight")
_DENSE = 0.9  # of a dense weight: above this share of non-zeros no pattern is made of it, as it would only be large


class Matrix(NamedTuple):
    """A weight (in, out).

    Attributes:
      stored: "sparse", "blocks", "diagonal" (blocks along the diagonal) or "dense": how the checkpoint has it.
      pattern: where it stores, or, where it is dense, is not zero; None of a dense one with few zeros.
      values: of the pattern; of a dense matrix without one, the matrix; None where a format stores none.
      density: the share that is stored, or is not zero.
    """

    stored: str
    shape: tuple[int, int]
    pattern: BlockPattern | None
    values: np.ndarray | None
    density: float


def read(path: str | os.PathLike) -> dict[str, Matrix]:
    """Every weight matrix of a checkpoint, by its dotted path.

    It reads what `jaxsparse.checkpoint`, `torch_bridge.checkpoint` and Orbax write (of a folder of steps the last), and
    whatever `jaxsparse.files.read` reads: safetensors and folders of them, as Hugging Face has, `torch.save`, SciPy's
    .npz, Matrix Market. Buffers of torch's layers, and patterns beside values, are put together. Dense weights are
    those called "kernel" (in, out) or "weight" (out, in), outside of optimizer states. Block-diagonal ones are known by
    their biases.

    Raises:
      ValueError: with the reason, for other content, and where there is no weight matrix.
      FileNotFoundError, ImportError: as `files.read`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    found = dict(_matrices(_leaves(_load(path))))
    if not found:
        raise ValueError(f"{path} holds no weight matrix: no pattern, and no 2-D array called kernel or weight.")
    return found


# ---- what was saved ---------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    if path.is_dir():
        trees = _orbax_trees(path)
        return _restore(trees) if trees else files.read(path)
    return checkpoint.load(path) if _is_ours(path) else files.read(path)


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
        if head[8:] != b"{":
            return False
        try:
            about = json.loads(b"{" + file.read(int.from_bytes(head[:8], "little") - 1)).get("__metadata__", {})
        except (ValueError, OverflowError, MemoryError):
            return False
    return about.get("format") == checkpoint.FORMAT


def _orbax_trees(path: Path) -> dict[str, Path]:
    """The trees in a folder of Orbax, by name: itself, those of a step, or those of the last of its steps."""
    if (path / _ORBAX).exists():
        return {"": path}
    named = {folder.name: folder for folder in sorted(path.iterdir()) if (folder / _ORBAX).exists()}
    steps = sorted((folder for folder in path.iterdir() if folder.name.isdecimal()), key=lambda f: int(f.name))
    if named or not steps:
        return {"": next(iter(named.values()))} if len(named) == 1 else named
    return _orbax_trees(steps[-1])


def _restore(trees: Mapping[str, Path]) -> Any:
    try:
        import orbax.checkpoint as ocp
        from etils import epath
    except ImportError as error:
        raise ImportError("a checkpoint of Orbax is read by Orbax: pip install orbax-checkpoint.") from error
    handler = ocp.PyTreeCheckpointHandler()

    def restore(folder: Path) -> Any:
        where = epath.Path(folder.resolve())
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(where).tree)
        return handler.restore(where, args=ocp.args.PyTreeRestore(restore_args=kinds))

    restored = {name: checkpoint.restore_patterns(restore(folder)) for name, folder in trees.items()}
    return restored[""] if set(restored) == {""} else restored


# ---- the matrices in it -----------------------------------------------------------------------------------

_Path = tuple[str, ...]


def _leaves(tree: Any) -> dict[_Path, Any]:
    """Arrays, patterns and matrices by their keys. Dots in names, as state_dicts have, part them too."""

    def is_whole(node: Any) -> bool:
        return isinstance(node, (BlockPattern, SparseMatrix))

    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_whole)
    leaves = {}
    for entries, leaf in pairs:
        keys = jax.tree_util.keystr(entries, simple=True, separator=".").split(".")
        leaves[tuple(keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys)] = (
            leaf  # Orbax saves NNX's variables
        )
    return leaves


def _matrices(leaves: dict[_Path, Any]) -> Iterator[tuple[str, Matrix]]:
    """The matrices in the order of their values."""
    place = {path: n for n, path in enumerate(leaves)}
    found: list[tuple[int, _Path, SparseMatrix | np.ndarray]] = []
    used: set[_Path] = set()
    for path, leaf in leaves.items():
        if path[-1] == "sizes" and _has_buffers(leaves, path[:-1]):
            used.add(weight := (*path[:-1], "weight"))
            found.append((place[weight], path[:-1], _from_buffers(leaves, path[:-1])))
        elif isinstance(leaf, SparseMatrix):
            found.append((place[path], path, leaf))
        elif isinstance(leaf, BlockPattern):
            values = _values_of(leaves, path, leaf)
            used.add(values or path)
            matrix = SparseMatrix(leaf, leaves[values] if values else None)
            found.append((place[values or path], _layer(values or path), matrix))
    for path, leaf in leaves.items():
        if path not in used and _is_dense(path, leaf):
            found.append((place[path], _layer(path), _as_stored(path, leaf)))
        elif path not in used and _is_diagonal(leaves, path):
            found.append((place[path], _layer(path), np.asarray(leaf)))
    for _, path, matrix in sorted(found, key=lambda item: item[0]):
        if isinstance(matrix, SparseMatrix):
            yield from _sparse(path, matrix)
        else:
            yield ".".join(path), _dense(matrix) if matrix.ndim == 2 else _diagonal(matrix)


def _layer(path: _Path) -> _Path:
    """The path of the layer that a leaf belongs to, without the collection that Linen keeps it in."""
    layer = path[1:-1] if path[0] in ("params", "pattern") and len(path) > 2 else path[:-1]
    return layer or path


def _values_of(leaves: dict[_Path, Any], path: _Path, pattern: BlockPattern) -> _Path | None:
    """The place of a pattern's values: beside it, or at the same place in the collection of parameters."""
    shape = pattern.values_shape

    def fits(other: _Path, leaf: Any) -> bool:
        beside = other[:-1] == path[:-1] or (
            path[0] == "pattern" and other[0] == "params" and other[1:-1] == path[1:-1]
        )
        return beside and np.shape(leaf)[-len(shape) :] == shape and leaf is not pattern

    return next((other for other, leaf in leaves.items() if fits(other, leaf)), None)


def _has_buffers(leaves: dict[_Path, Any], layer: _Path) -> bool:
    return all((*layer, name) in leaves for name in (*Index._fields, "weight"))


def _from_buffers(leaves: dict[_Path, Any], layer: _Path) -> SparseMatrix:
    """The matrix of a layer of torch_bridge, whose state_dict has the pattern's arrays, and its sizes."""
    rows, cols, i, o, transposed = np.asarray(leaves[*layer, "sizes"]).tolist()
    arrays = {name: np.asarray(leaves[*layer, name]) for name in Index._fields}
    state = {**arrays, "shape": (rows, cols), "block": (i, o), "transposed": transposed}
    return SparseMatrix(BlockPattern.from_state(state), np.asarray(leaves[*layer, "weight"]))


def _sparse(path: _Path, matrix: SparseMatrix) -> Iterator[tuple[str, Matrix]]:
    """One matrix, or those of a stack, as scanned layers have."""
    pattern, values = matrix
    name = ".".join(path)
    if pattern.row_index.ndim == 1:
        stored = "sparse" if pattern.is_unstructured else "blocks"
        yield (
            name,
            Matrix(stored, pattern.shape, pattern, None if values is None else np.asarray(values), pattern.density),
        )
        return
    for n in range(pattern.row_index.shape[0]):
        one = jax.tree.map(lambda a, n=n: a[n], pattern)
        yield from _sparse((*path, str(n)), SparseMatrix(one, None if values is None else np.asarray(values)[n]))


def _is_diagonal(leaves: dict[_Path, Any], path: _Path) -> bool:
    """Whether this is the weight [n, i, o] of a block-diagonal layer, by its bias [n * o]; a convolution has [o]."""
    if not _is_weight(path, leaves[path], 3):
        return False
    (n, _, o), bias = leaves[path].shape, leaves.get((*path[:-1], "bias"))
    return min(n, o) > 1 and bias is not None and np.shape(bias) == (n * o,)


def _diagonal(blocks: np.ndarray) -> Matrix:
    n, i, o = blocks.shape
    pattern = BlockPattern.block_diagonal(n, (i, o))
    return Matrix("diagonal", pattern.shape, pattern, blocks.reshape(pattern.values_shape), 1 / n)


def _is_dense(path: _Path, leaf: Any) -> bool:
    return _is_weight(path, leaf, 2) and min(leaf.shape) > 0


def _is_weight(path: _Path, leaf: Any, ndim: int) -> bool:
    """Whether this array is called a weight, is of floats, and is neither a moment of one nor an embedding."""
    if path[-1] not in _WEIGHTS or _NO_WEIGHTS & set(path) or not hasattr(leaf, "dtype"):
        return False
    if len(path) > 1 and "embed" in path[-2]:  # a table of rows to look up, which torch calls a weight too
        return False
    return leaf.ndim == ndim and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)


def _as_stored(path: _Path, leaf: Any) -> np.ndarray:
    """A dense weight as (in, out)."""
    return np.asarray(leaf).T if path[-1] == "weight" else np.asarray(leaf)


def _dense(w: np.ndarray) -> Matrix:
    density = np.count_nonzero(w) / w.size
    if density > _DENSE:
        return Matrix("dense", w.shape, None, w, density)
    pattern = BlockPattern.from_mask(w)
    values = w[np.asarray(pattern.rows), np.asarray(pattern.cols)]
    return Matrix("dense", w.shape, pattern, values, density)
