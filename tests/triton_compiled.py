"""Compiles the Triton kernels for an H100 that is not here, and prints as JSON what became of them.

python triton_compiled.py FOLDER DUMP: the FOLDER of mosaic_compiled.py, and an empty one for what XLA writes. XLA
is told to refuse what spills registers.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_fail_ptx_compilation_on_register_spilling=true --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=ptx "
    f"--xla_dump_to={sys.argv[2]}"
)

import jax
import jax.numpy as jnp
import mosaic_compiled

from pallas_kernels import triton
from pallas_kernels._lines import Index, lines_of
from pallas_kernels.triton import entries

DUMP = Path(sys.argv[2])
N = 4096


def products(gpu, m: int, block: int, dtype, index_dtype=jnp.int32, precision=None) -> dict:
    """Name to a product at density 0.1 and what it is called with."""
    lines = N // block
    nnzb = lines * lines // 10
    values = (nnzb,) if block == 1 else (nnzb, block, block)
    x, blocks, bias = mosaic_compiled.arrays(gpu, ((m, N), dtype), (values, dtype), ((N,), dtype))
    shapes = ((lines + 1,), jnp.int32), ((nnzb,), index_dtype), ((nnzb,), jnp.int32)
    ptr, source, order = mosaic_compiled.arrays(gpu, *shapes)
    index = Index(ptr, source, ptr, order, order)
    how = {"shape": (N, N), "block": (block, block), "precision": precision}
    return {
        "forward": (functools.partial(triton.spmm, **how, activation="gelu"), x, blocks, index, bias),
        "input gradient": (functools.partial(triton.spmm, **how, transposed=True), x, blocks, index),
        "weight gradient": (functools.partial(triton.sddmm, **how), x, x, index),
    }


def report(f, x, *operands) -> dict:
    """Why the compiler refused, or what it made."""
    before = set(DUMP.iterdir())
    try:
        with jax.sharding.use_abstract_mesh(x.sharding.mesh.abstract_mesh):
            mosaic_compiled.compiled(f, x, *operands)
    except jax.errors.JaxRuntimeError as refused:
        return {"refused": str(refused)}
    texts = [path.read_text() for path in set(DUMP.glob("*.ptx")) - before]
    (kernel,) = (text for text in texts if ".entry jaxsparse_" in text)
    return {"loads of 16 bytes": kernel.count("ld.global.v4"), "tensor cores": kernel.count("wgmma.mma_async")}


if __name__ == "__main__":
    gpu = mosaic_compiled.mesh(1)
    calls = {
        "entries": products(gpu, 16, 1, jnp.bfloat16, jnp.uint16),
        "entries, one row": products(gpu, 1, 1, jnp.float32),
        "blocks": products(gpu, 1024, 128, jnp.bfloat16),
        "blocks, exact": products(gpu, 1024, 128, jnp.float32, precision="highest"),
    }
    result = {name: {product: report(*call) for product, call in each.items()} for name, each in calls.items()}
    _, x, values, index, _ = calls["entries"]["forward"]
    large = functools.partial(entries.gather, bias=None, activation=None, interpret=False, numbers=2**15)
    result["a tile that is too large"] = report(large, x, values, lines_of(index, True))
    print(json.dumps(result))
