"""Compiles products for 8 H100s that are not here, and prints as JSON which collectives the programs have.

python mesh_compiled.py FOLDER: the FOLDER of mosaic_compiled.py.
"""

import json
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import mosaic_compiled
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import BlockPattern, block_diag_matmul, spmm

COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
M, N = 512, 256


def sent(gpus, function, *operands) -> dict[str, int]:
    """Of operands (array or shape, spec), the collectives of a program: each name and how often."""
    place = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(gpus, spec))  # noqa: E731
    arrays = [jax.tree.map(lambda leaf, spec=spec: place(leaf, spec), tree) for tree, spec in operands]
    program, _ = mosaic_compiled.compiled(function, *arrays)
    return {name: n for name in COLLECTIVES if (n := len(re.findall(rf" {name}(?:-start)?\(", program)))}


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def of_sparse(gpus, block: int) -> dict:
    pattern = BlockPattern.random(jax.random.key(0), (N, N), density=0.25, block=block)

    def multiply(x, w, b, pattern):
        return spmm(x, w, pattern, b, backend="xla")

    def gradients(x, w, b, pattern):
        return jax.grad(lambda *a: jnp.sin(multiply(*a, pattern)).sum(), (0, 1, 2))(x, w, b)

    operands = (float32(M, N), P("batch")), (float32(*pattern.values_shape), P()), (float32(N), P()), (pattern, P())
    return {"forward": sent(gpus, multiply, *operands), "gradients": sent(gpus, gradients, *operands)}


def of_diagonal(gpus, *specs) -> dict:
    def gradients(x, w, b):
        return jax.grad(lambda *a: jnp.sin(block_diag_matmul(*a, backend="xla")).sum(), (0, 1, 2))(x, w, b)

    operands = list(zip((float32(M, N), float32(8, 32, 32), float32(N)), specs, strict=True))
    multiply = lambda x, w, b: block_diag_matmul(x, w, b, backend="xla")  # noqa: E731
    return {"forward": sent(gpus, multiply, *operands), "gradients": sent(gpus, gradients, *operands)}


# By XLA alone: where its partitioner asks for a kernel, Pallas looks for a GPU to compile it for, and here is none.
gpus = mosaic_compiled.mesh(8)
found = {
    "entries, batch": of_sparse(gpus, 1),
    "blocks, batch": of_sparse(gpus, 32),
    "diagonal, batch": of_diagonal(gpus, P("batch"), P(), P()),
    "diagonal, blocks": of_diagonal(gpus, P(None, "batch"), P("batch"), P("batch")),
}
print(json.dumps(found))
