"""Compiles products for 8 H100s that are not here, and prints as JSON which collectives the programs have.

python mesh_compiled.py FOLDER: the FOLDER of mosaic_compiled.py.
"""

import contextlib
import json
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import mosaic_compiled
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import BlockPattern, block_diag_matmul, spmm

COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
CALLS = {"xla": None, "triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu"}  # what a kernel is called in a program
M, N = 512, 256


def sent(gpus, backend: str, function, *operands) -> dict[str, int]:
    """Of operands (array or shape, spec), the collectives of a program: each name and how often."""
    place = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(gpus, spec))  # noqa: E731
    arrays = [jax.tree.map(lambda leaf, spec=spec: place(leaf, spec), tree) for tree, spec in operands]
    with jax.set_mesh(gpus) if AxisType.Explicit in gpus.axis_types else contextlib.nullcontext():
        program, _ = mosaic_compiled.compiled(function, *arrays)
    called = CALLS[backend]
    assert called is None or called in program, f"no kernel of {backend} in:\n{program}"
    return {name: n for name in COLLECTIVES if (n := len(re.findall(rf" {name}(?:-start)?\(", program)))}


def both(gpus, backend: str, multiply, operands, constants=()) -> dict[str, dict[str, int]]:
    """The collectives of a product of `operands` (and constants), and of its gradients."""
    count = len(operands)

    def gradients(*a):
        loss = lambda *wrt: jnp.sin(multiply(*wrt, *a[count:])).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, tuple(range(count)))(*a[:count])

    return {
        name: sent(gpus, backend, f, *operands, *constants)
        for name, f in (("forward", multiply), ("gradients", gradients))
    }


def of_sparse(gpus, backend: str, block: int) -> dict[str, dict[str, int]]:
    pattern = BlockPattern.random(jax.random.key(0), (N, N), density=0.25, block=block)
    multiply = lambda x, w, b, pattern: spmm(x, w, pattern, b, backend=backend)  # noqa: E731
    operands = (
        (array(backend, M, N), P("batch")),
        (array(backend, *pattern.values_shape), P()),
        (array(backend, N), P()),
    )
    return both(gpus, backend, multiply, operands, [(pattern, P())])


def of_diagonal(gpus, backend: str, *specs) -> dict[str, dict[str, int]]:
    shapes = (M, 8 * BLOCK), (8, BLOCK, BLOCK), (8 * BLOCK,)
    operands = [(array(backend, *shape), spec) for shape, spec in zip(shapes, specs, strict=True)]
    return both(gpus, backend, lambda x, w, b: block_diag_matmul(x, w, b, backend=backend), operands)


def array(backend: str, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if backend == "mosaic" else jnp.float32)


def found(gpus) -> dict[str, dict[str, dict[str, int]]]:
    by_backend = {f"{name}: entries, batch": of_sparse(gpus, name, 1) for name in ("xla", "triton")}
    for name in CALLS:
        by_backend |= {
            f"{name}: blocks, batch": of_sparse(gpus, name, BLOCK),
            f"{name}: diagonal, batch": of_diagonal(gpus, name, P("batch"), P(), P()),
            f"{name}: diagonal, blocks": of_diagonal(gpus, name, P(None, "batch"), P("batch"), P("batch")),
        }
    return by_backend


BLOCK = 64
automatic = mosaic_compiled.mesh(8)
explicit = Mesh(automatic.devices, automatic.axis_names, axis_types=(AxisType.Explicit,))
entries = {f"{name}: entries": of_sparse(explicit, name, 1) for name in ("xla", "triton")}
blocks = {f"{name}: blocks": of_sparse(explicit, name, BLOCK) for name in CALLS}
print(json.dumps({"automatic": found(automatic), "explicit": {**entries, **blocks}}))
