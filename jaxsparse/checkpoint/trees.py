"""Trees of any containers: taken apart into JSON and named arrays, and built from them."""

from __future__ import annotations

import collections
import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _indices
from jaxsparse._sizes import check_sizes, grid_of
from jaxsparse.formats import PATTERNS, BlockPattern, NMPattern

Path = tuple[Any, ...]  # the keys that lead to a node, of the types that they have in its container
Arrays = dict[str, np.ndarray]

DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALARS = (type(None), bool, int, float, str)  # JSON holds them exactly
_BUILTIN = (dict, collections.OrderedDict, collections.defaultdict, list, tuple)
_KEYS = (type(None), bool, int, float, str)


def shown(path: Path) -> str:
    """A path as it stands in code, ['opt_state'][0]['mu']: the types of its keys can be seen."""
    return "".join(f"[{key!r}]" for key in path) or "the top of the tree"


# ---- apart -----------------------------------------------------------------------------------------------


def take_apart(tree: Any, arrays: Arrays, read: Callable[[Any], Any], path: Path = ()) -> dict[str, Any]:
    """The JSON of a tree. Its arrays are put into `arrays`, named by their paths.

    Args:
      read: makes of a leaf what NumPy reads; leaves of other kinds it returns as they are.
    Raises:
      ValueError: with the path and the type, for what can't be saved.
    """
    tree = tree.get_value() if is_variable(tree) else tree  # a state is saved as the pure dict of its values
    container = opened(tree, path)
    if container is None:
        return _leaf(tree, arrays, read, path)
    keys, children, _ = container
    for key in keys:
        _check_key(key, path)
    nodes = [(key, take_apart(child, arrays, read, (*path, key))) for key, child in zip(keys, children, strict=True)]
    if isinstance(tree, (list, tuple)) and not is_namedtuple(tree):
        return {"list" if isinstance(tree, list) else "tuple": [node for _, node in nodes]}
    if not nodes and not isinstance(tree, (Mapping, tuple)):
        raise ValueError(
            f"{shown(path)} is a {type_name(tree)} without children: what it holds is static, and no file could give "
            "it back. Save the state of a model (nnx.state), and leave out what describes it."
        )
    node: dict[str, Any] = {"dict": nodes}
    if isinstance(tree, collections.OrderedDict):
        node["ordered"] = True
        if hasattr(tree, "_metadata"):  # torch keeps the versions of its modules there
            node["metadata"] = take_apart(tree._metadata, arrays, read, (*path, "_metadata"))  # pyright: ignore
    return node


class Container(NamedTuple):
    """One node of a tree, in its own order, and how to make one like it of other children."""

    keys: list[Any]
    children: list[Any]
    rebuilt: Callable[[list[Any]], Any]


def opened(node: Any, path: Path = ()) -> Container | None:
    """A node as a container; None for a leaf. Only what JAX can't flatten, or would sort, is opened here."""
    if node is None or isinstance(node, PATTERNS):
        return None
    if type(node) not in _BUILTIN and not is_namedtuple(node):
        pairs, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
        if [entries for entries, _ in pairs] != [()]:
            keys = [_plain(entry) for (entry,), _ in pairs]
            if len(set(keys)) < len(keys):
                raise ValueError(f"{shown(path)}, a {type_name(node)}, gives several of its children one key: {keys}.")
            return Container(keys, [child for _, child in pairs], treedef.unflatten)
    if isinstance(node, Mapping):
        keys = list(node)
        return Container(
            keys, [node[key] for key in keys], lambda new: _mapping_like(node, zip(keys, new, strict=True))
        )
    if isinstance(node, (list, tuple)):
        make = type(node)
        if is_namedtuple(node):
            return Container(list(node._fields), list(node), lambda new: make(*new))  # pyright: ignore
        return Container(list(range(len(node))), list(node), make)
    return None


def _mapping_like(node: Mapping, pairs: Iterable[tuple[Any, Any]]) -> Any:
    if not isinstance(node, dict):
        return type(node)(dict(pairs))  # pyright: ignore
    new = copy.copy(node)  # with its order, its default, and what else it carries
    new.update(pairs)
    return new


def _plain(entry: Any) -> Any:
    """The key in a JAX key entry: an attribute's name, a position, or what a mapping uses."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def is_namedtuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # who hands one in has imported it
    return nnx is not None and isinstance(node, nnx.Variable)


def type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _check_key(key: Any, path: Path) -> None:
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in _KEYS and part == part for part in parts):
        raise ValueError(
            f"the key {key!r} in {shown(path)} is a {type_name(key)}, which could not come back as it is; keys are "
            "strings, numbers, None, or tuples of them."
        )


def _leaf(leaf: Any, arrays: Arrays, read: Callable[[Any], Any], path: Path) -> dict[str, Any]:
    if isinstance(leaf, BlockPattern):
        return _pattern_apart(leaf, arrays, read, path)
    if isinstance(leaf, NMPattern):
        bits = take_apart(leaf.bits, arrays, read, (*path, "bits"))
        sizes = {"n": leaf.n, "m": leaf.m, "shape": leaf.shape, "transposed": leaf.transposed}
        return {"n_m": "pattern" if _is_whole(leaf, sizes) else "form", "bits": bits, **sizes}
    if type(leaf) in _SCALARS:
        return {"value": leaf}
    if type(leaf) is complex:
        return {"complex": [leaf.real, leaf.imag]}
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(leaf)
        if not isinstance(impl, str):
            raise ValueError(f"{shown(path)} is a PRNG key of {impl}, which has no name to find it by. Use key_data.")
        return {"key": _add(arrays, path, _as_numpy(jax.random.key_data(leaf), read, path)), "impl": impl}
    a = _as_numpy(leaf, read, path)
    stored, dtype = _storable(a, path)
    return {"array": _add(arrays, path, stored), **({} if dtype is None else {"dtype": dtype})}


def _as_numpy(leaf: Any, read: Callable[[Any], Any], path: Path) -> np.ndarray:
    try:
        leaf = read(leaf)
        known = isinstance(leaf, (np.ndarray, np.generic)) or (
            hasattr(leaf, "__array__") and hasattr(leaf, "__dlpack__")
        )
        if known and not isinstance(leaf, np.ma.MaskedArray):
            return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{shown(path)} is a {type_name(leaf)} that can't be read as an array: {error}") from error
    raise ValueError(
        f"{shown(path)} is a {type_name(leaf)}, which can't be saved: a tree holds arrays, patterns, PRNG keys, "
        "numbers, strings and None, in containers that JAX knows as pytrees. Leave it out, or make it one of these."
    )


def _storable(a: np.ndarray, path: Path) -> tuple[np.ndarray, str | None]:
    """An array of a dtype that safetensors has a name for, and the dtype that it stands for, if another."""
    if a.dtype in NAMES:
        return a, None
    name, a = a.dtype.name, np.ascontiguousarray(a).reshape(a.shape)  # of no dimensions it would make one
    if a.dtype.isnative and name in ("complex64", "complex128"):
        return a[..., None].view(np.float32 if name == "complex64" else np.float64), name
    if a.dtype.itemsize == 1 and a.dtype.kind == "V" and np.dtype(name) == a.dtype:  # int4 and the rarer float8s
        return a.view(np.uint8), name
    raise ValueError(f"{shown(path)} is {a.dtype}, which safetensors has no name for; it has {', '.join(DTYPES)}.")


def _add(arrays: Arrays, path: Path, a: np.ndarray) -> str:
    """Puts an array in under a name of its own: its path with dots, and a number where another has that name."""
    name = ".".join("/".join(map(str, key)) if type(key) is tuple else str(key) for key in path)
    name = first = name.encode("utf-8", "backslashreplace").decode() or "value"
    count = 1
    while name in arrays or name == "__metadata__":
        count += 1
        name = f"{first}~{count}"
    arrays[name] = a
    return name


def _pattern_apart(pattern: BlockPattern, arrays: Arrays, read: Callable[[Any], Any], path: Path) -> dict[str, Any]:
    """Two arrays say what a pattern is. What only has its form, as an optimizer's moments, is saved field by field."""
    sizes = {"shape": pattern.shape, "block": pattern.block, "transposed": pattern.transposed}
    try:
        grid = pattern.grid
        _indices.check_index(pattern.index, (grid[1], grid[0]) if pattern.transposed else grid)
    except (TypeError, ValueError):
        fields = pattern.index._asdict()
        return {"fields": {name: take_apart(a, arrays, read, (*path, name)) for name, a in fields.items()}, **sizes}
    names = [_add(arrays, (*path, part), np.asarray(getattr(pattern, part))) for part in ("col_ptr", "row_index")]
    return {"pattern": names, **sizes}


# ---- together --------------------------------------------------------------------------------------------


def build(node: dict[str, Any], arrays: Arrays, make: Callable[[np.ndarray], Any]) -> Any:
    """The tree of its JSON: dicts, lists and tuples, with keys of the types that they had.

    Args:
      make: makes of an array what the tree shall hold.
    """
    if "dict" in node:
        pairs = [(_as_key(key), build(child, arrays, make)) for key, child in node["dict"]]
        tree = collections.OrderedDict(pairs) if node.get("ordered") else dict(pairs)
        if "metadata" in node:
            tree._metadata = build(node["metadata"], arrays, make)  # pyright: ignore[reportAttributeAccessIssue]
        return tree
    if "list" in node:
        return [build(child, arrays, make) for child in node["list"]]
    if "tuple" in node:
        return tuple([build(child, arrays, make) for child in node["tuple"]])
    if "value" in node:
        return node["value"]
    if "complex" in node:
        real, imaginary = node["complex"]
        return complex(real, imaginary)
    if "key" in node:
        return jax.random.wrap_key_data(jnp.array(arrays[node["key"]]), impl=node["impl"])
    if "pattern" in node:
        col_ptr, row_index = node["pattern"]
        return _pattern(arrays[col_ptr], arrays[row_index], node)
    if "fields" in node:
        fields = {name: build(child, arrays, lambda a: a) for name, child in node["fields"].items()}
        return BlockPattern.of_index(_indices.Index(**fields), **_sizes(node))
    if "n_m" in node:
        return _n_m_pattern(build(node["bits"], arrays, lambda a: a), node)
    return make(_unstored(arrays[node["array"]], node.get("dtype")))


def _as_key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _unstored(a: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype is None:
        return a
    return a.view(np.dtype(dtype)).reshape(a.shape[:-1] if dtype.startswith("complex") else a.shape)


def _pattern(col_ptr: np.ndarray, row_index: np.ndarray, node: dict[str, Any]) -> BlockPattern:
    """The pattern, or the stack of them, of the two stored arrays, which are checked; the others are computed."""
    sizes = _sizes(node)
    grid = grid_of(sizes["shape"], sizes["block"])
    index = _indices.from_pointers(col_ptr, row_index, (grid[1], grid[0]) if sizes["transposed"] else grid)
    if row_index.dtype == np.uint16:  # a narrow index stays one
        index = index._replace(row_index=jnp.array(row_index))
    return BlockPattern.of_index(index, **sizes)


def _n_m_pattern(bits: Any, node: dict[str, Any]) -> NMPattern:
    """The pattern of its bits, which are checked; what only has a pattern's form, as moments, comes back as it was."""
    sizes = {name: node[name] for name in ("n", "m", "shape", "transposed")}
    if node["n_m"] == "pattern":
        return NMPattern.from_bits(bits, **sizes)
    return NMPattern(bits, **{**sizes, "shape": tuple(node["shape"])})


def _is_whole(pattern: NMPattern, sizes: dict[str, Any]) -> bool:
    try:
        NMPattern.from_bits(pattern.bits, **sizes)
    except (TypeError, ValueError):
        return False
    return True


def _sizes(node: dict[str, Any]) -> dict[str, Any]:
    shape, block = check_sizes(node["shape"], node["block"])
    return {"shape": shape, "block": block, "transposed": node["transposed"]}


def names_to_nodes(names: Iterable[str], patterns: dict[str, Any], empty: list[str]) -> dict[str, Any]:
    """The JSON of a tree as version 1 wrote it: nested dicts, whose keys are joined by dots in the names."""
    nodes: dict[str, Any] = {name: {"array": name} for name in names}
    nodes |= {name: {"dict": []} for name in empty}
    for name, sizes in patterns.items():
        parts = [f"{name}.{part}" for part in ("col_ptr", "row_index")]
        nodes[name] = {"pattern": parts, **sizes}
        for part in parts:
            del nodes[part]
    tree: dict[str, Any] = {}
    for name in sorted(nodes):
        *parents, last = name.split(".")
        level = tree
        for key in parents:
            level = level.setdefault(key, {"dict": {}})["dict"]
        level[last] = nodes[name]
    return _listed({"dict": tree})


def _listed(node: dict[str, Any]) -> dict[str, Any]:
    if isinstance(node.get("dict"), dict):
        return {"dict": [(key, _listed(child)) for key, child in node["dict"].items()]}
    return node
