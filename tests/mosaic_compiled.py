"""Compiles the Mosaic kernels for an H100 that is not here, through ptxas, and prints as JSON what that says.

python mosaic_compiled.py FOLDER, a folder with the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own
version (pip install --no-deps --target FOLDER ...); they hold the compiler, so no driver and no toolkit is needed.
"""

import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from a cache is heard from no compiler
sys.path.insert(0, sys.argv[1])

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxsparse import BlockPattern, _measured, _xla, spmm
from pallas_kernels import mosaic
from pallas_kernels._lines import Index

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
"""
REPLICATED = PartitionSpec()
FORMS = {"expanded": 2**26, "walked": 0}  # how XLA's own products are made, and how many entries they may expand


def mesh(gpus: int):
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{gpus}")
    return topologies.make_mesh(topo=topology, mesh_shape=(gpus,), axis_names=("batch",))


def arrays(mesh, *shapes, spec=REPLICATED):
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype in shapes]


def pattern(mesh, lines: int, nnzb: int) -> Index:
    return Index(*arrays(mesh, *(((n,), jnp.int32) for n in (lines + 1, nnzb, lines + 1, nnzb, nnzb))))


def compiled(f, *operands) -> tuple[str, str]:
    """(the program, what the compilers wrote on standard output and error while they made it)."""
    with tempfile.TemporaryFile("w+") as heard:
        saved = [os.dup(1), os.dup(2)]
        try:
            for number in (1, 2):
                os.dup2(heard.fileno(), number)
            program = jax.jit(f).lower(*operands).compile().as_text()
        finally:
            for number, to in zip((1, 2), saved, strict=True):
                os.dup2(to, number)
        heard.seek(0)
        return program, heard.read()


def report(f, *operands) -> dict:
    _, said = compiled(f, *operands)
    return {
        "kernels": said.count(".entry"),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "tensor cores": said.count("wgmma.mma_async"),
        "TMA": said.count("cp.async.bulk.tensor"),
        "multicast": said.count("multicast::cluster"),
        "serialised": said.count("serialized"),  # ptxas says so where products can't overlap
    }


def products(gpu, block: int, m: int, dtype, lines: int = 32, nnzb: int = 200) -> dict:
    size = lines * block
    x, blocks, bias = arrays(gpu, ((m, size), dtype), ((nnzb, block, block), dtype), ((size,), dtype))
    index, sizes = pattern(gpu, lines, nnzb), {"shape": (size, size), "block": (block, block)}
    gelu = functools.partial(mosaic.spmm, **sizes, activation="gelu")
    return {
        "forward": report(gelu, x, blocks, index, bias),
        "input gradient": report(functools.partial(mosaic.spmm, **sizes, transposed=True), x, blocks, index),
        "weight gradient": sampled(gpu, block, m, dtype, lines, nnzb),
    }


def sampled(gpu, block: int, m: int, dtype, lines: int, nnzb: int) -> dict:
    size = lines * block
    (x,) = arrays(gpu, ((m, size), dtype))
    one = functools.partial(mosaic.sddmm, shape=(size, size), block=(block, block))
    return report(one, x, x, pattern(gpu, lines, nnzb))


def x_shared(gpu, block: int = 32, lines: int = 128, m: int = 8192) -> dict:
    """The products of programs that share x or hold it in registers, as they are chosen at three densities."""
    found, size = {}, lines * block
    for way, part in (("two share x", 4), ("four share, registers", 10), ("two share blocks, registers", 2)):
        nnzb = lines**2 // part
        x, blocks, bias = arrays(gpu, *((shape, jnp.bfloat16) for shape in ((m, size), (nnzb, block, block), (size,))))
        index, sizes = pattern(gpu, lines, nnzb), {"shape": (size, size), "block": (block, block)}
        gelu = functools.partial(mosaic.spmm, **sizes, activation="gelu")
        found[f"forward, {way}"] = report(gelu, x, blocks, index, bias)
        back = functools.partial(mosaic.spmm, **sizes, transposed=True)
        found[f"input gradient, {way}"] = report(back, x, blocks, index)
    return found


def collectives(gpus) -> list[str]:
    """Those of a product that runs on 8 GPUs inside shard_map, the batch cut among them."""
    (x,) = arrays(gpus, ((8192, 2048), jnp.bfloat16), spec=PartitionSpec("batch"))
    (blocks,) = arrays(gpus, ((64, 128, 128), jnp.bfloat16))
    one = functools.partial(mosaic.spmm, shape=(2048, 2048), block=(128, 128))
    specs = PartitionSpec("batch"), PartitionSpec(), PartitionSpec()
    f = jax.shard_map(one, mesh=gpus, in_specs=specs, out_specs=PartitionSpec("batch"), check_vma=False)
    program, _ = compiled(f, x, blocks, pattern(gpus, 16, 64))
    assert "jaxsparse_gather" in program or "mosaic_gpu" in program, program
    return re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program)


def expanded(gpu, size: int = 1024, m: int = 256) -> dict:
    """Of XLA's own step with single entries: the dense arrays that it makes, and the bytes it needs beside its own."""
    nnz = size**2 // 10
    x, values = arrays(gpu, ((m, size), jnp.bfloat16), ((nnz,), jnp.bfloat16))
    sizes = {"shape": (size, size), "block": (1, 1)}

    def step(x, values, index):
        y = _xla.spmm(x, values, index, **sizes)
        return y, _xla.spmm_grads(x, y, values, index, **sizes)

    program = jax.jit(step).lower(x, values, pattern(gpu, size, nnz)).compile()
    dense = re.findall(rf"= (\w+)\[{size},{size}\]\S* fusion", program.as_text().split("ENTRY")[1])
    memory = program.memory_analysis()
    return {"dense": sorted(dense), "weights": memory.temp_size_in_bytes / (2 * size**2)}


def loops(gpu, limit: int, block: int) -> dict:
    """The loops of XLA's own step where so many entries may be expanded, and how many have a length known to XLA."""
    _xla.DENSE_LIMIT = limit
    lines = nnzb = 64
    x, blocks = arrays(
        gpu, ((32, lines * block), jnp.bfloat16), ((nnzb, block, block)[: 3 if block > 1 else 1], jnp.bfloat16)
    )
    sizes = {"shape": (lines * block, lines * block), "block": (block, block)}

    def step(x, blocks, index):
        y = _xla.spmm(x, blocks, index, **sizes)
        return y, _xla.spmm_grads(x, y, blocks, index, **sizes)

    program, _ = compiled(step, x, blocks, pattern(gpu, lines, nnzb))
    return {"all": program.count(" while("), "of known length": program.count("known_trip_count")}


def chosen(gpu) -> list[int]:
    """How many kernels of ours a step has whose back end nobody names: with no measurement, and with a made-up one."""
    p = BlockPattern.random(jax.random.key(0), (1024, 1024), density=0.25, block=64)
    x, w = arrays(gpu, ((1024, 1024), jnp.bfloat16), (p.values_shape, jnp.bfloat16))
    index = jax.tree.map(lambda a: arrays(gpu, (a.shape, a.dtype))[0], p)

    def count() -> int:
        step = lambda x, w, p: jax.vjp(lambda x, w: spmm(x, w, p), x, w)[1](x)  # noqa: E731  new, as JAX keeps what it lowered
        return jax.jit(step).lower(x, w, index).as_text().count("mosaic_gpu_v2")

    with tempfile.TemporaryDirectory() as folder:
        _measured.TABLE = Path(folder, "measured.json")
        counts = [count()]
        works = [_measured.Workload(op, "bfloat16", (64, 64), 1024, 0.25) for op in ("spmm", "sddmm")]
        _measured.write("NVIDIA H100 80GB HBM3", [_measured.Result(work, "mosaic", 2.0, "made up") for work in works])
        return [*counts, count()]


if __name__ == "__main__":
    gpu = mesh(1)
    result = {
        f"blocks of {b}, batch {m}": products(gpu, b, m, jnp.bfloat16) for b, m in ((128, 8192), (64, 100), (16, 64))
    }
    result |= {"blocks of 32, float16": products(gpu, 32, 8192, jnp.float16)}
    result |= {"lines together": products(gpu, 64, 8192, jnp.bfloat16, 64, 1024)}
    small = {f"weight gradient of {b}": sampled(gpu, b, 8192, jnp.bfloat16, 2048 // b, 40_960 // b) for b in (16, 32)}
    result |= {"pieces together": small}
    result |= {"x shared, or in registers": x_shared(gpu)}
    entries = expanded(gpu)
    xla = {f"{what}, {block}": loops(gpu, limit, block) for what, limit in FORMS.items() for block in (16, 1)}
    found = {"kernels": result, "collectives": collectives(mesh(8)), "entries": entries, "XLA's loops": xla}
    print(json.dumps(found | {"chosen": chosen(gpu)}))
