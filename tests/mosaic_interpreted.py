"""One case of the Mosaic kernels under the GPU interpreter: python mosaic_interpreted.py NAME [PRODUCT ...].

The products are y, dx and dW, all of them by default. Ends with 0 where every value is as close as the dense product's
and no race was seen. It is a program of its own, as a kernel that waits for ever, or that leaves the interpreter
broken, must not take the tests with it.
"""

import functools
import os
import sys

os.environ["NPROC"] = "16"  # threads of XLA: each of a kernel's warpgroups may keep one waiting

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsparse import BlockPattern, testing
from pallas_kernels import mosaic
from pallas_kernels._device import Device
from pallas_kernels.mosaic import configs

WANTED = set(sys.argv[2:]) or {"y", "dx", "dW"}


def products(shape, block, m, dtype, density=0.4):
    """y with bias, dx and dW of a pattern with an empty row and an empty column, against the oracle."""
    grid = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    mask = np.random.default_rng(1).random(grid) < density
    mask[0], mask[:, 1], mask[1] = True, False, False
    pattern = BlockPattern.from_mask(np.kron(mask, np.ones(block, bool))[: shape[0], : shape[1]], block)
    x, blocks, bias, dy = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, dtype)
    sizes = {"shape": shape, "block": block}
    got = {
        "y": lambda: mosaic.spmm(x, blocks, pattern.index, bias, **sizes),
        "dx": lambda: mosaic.spmm(dy, blocks, pattern.index, transposed=True, **sizes),
        "dW": lambda: mosaic.sddmm(x, dy, pattern.index, **sizes),
    }
    check(got, x, blocks, bias, dy, pattern)


def diagonal(n, block, m, dtype):
    pattern = BlockPattern.block_diagonal(n, block)
    x, blocks, bias, dy = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, dtype)
    got = {
        "y": lambda: mosaic.block_diag_matmul(x, blocks, bias),
        "dx": lambda: mosaic.block_diag_matmul(dy, blocks, transposed=True),
        "dW": lambda: mosaic.block_diag_outer(x, dy, n),
    }
    check(got, x, blocks, bias, dy, pattern)


def epilogues(m=40):
    """Every activation, against itself applied to the wide sum: at most one rounding apart."""
    pattern = BlockPattern.block_diagonal(2, (64, 64))
    x, blocks, bias, _ = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (x, pattern.to_dense(blocks), bias)]
    for activation in ("relu", "gelu", "silu"):
        want = getattr(jax.nn, activation)(wide[0] @ wide[1] + wide[2])
        got = mosaic.block_diag_matmul(x, blocks, bias, activation=activation).astype(jnp.float32)
        assert jnp.allclose(got, want, rtol=2**-7, atol=1e-4), activation


def mapped():
    """A stack of weights under vmap is the loop over them."""
    pattern = BlockPattern.block_diagonal(2, (64, 64))
    x, blocks = testing.normal(0, (64, 128), jnp.bfloat16), testing.normal(1, (2, 2, 64, 64), jnp.bfloat16)
    one = functools.partial(mosaic.spmm, shape=pattern.shape, block=pattern.block)
    got = jax.vmap(lambda w: one(x, w, pattern.index))(blocks)
    assert jnp.array_equal(got[1], one(x, blocks[1], pattern.index))


def check(got, x, blocks, bias, dy, pattern):
    truth = testing.true_products(x, blocks, bias, dy, pattern)
    dense = testing.dense_products(x, blocks, bias, dy, pattern)
    for name in WANTED & got.keys():
        testing.assert_as_close_as_dense(got[name](), truth[name], dense[name], name)


def clusters():
    """Two programs that share what they load of the blocks, over several bands of the batch."""
    configs.for_gather = lambda *_: configs.Gather(64, 64, 64, 1, 2, band=1, cluster=2)
    products((192, 256), (64, 64), 300, jnp.bfloat16)


def from_registers():
    """Teaches the interpreter products whose first operand is in registers: it takes it for a key to memory."""
    of_references = callbacks.wgmma

    @callbacks.fail_on_exception
    def wgmma(*, token, mesh_location, thread, a_allocation_key_as_array, source_info=None, **operands):
        a = np.asarray(a_allocation_key_as_array)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            operands |= {"thread": thread, "mesh_location": mesh_location, "source_info": source_info}
            return of_references(token=token, a_allocation_key_as_array=a_allocation_key_as_array, **operands)
        memory = callbacks._get_shared_memory()
        info = callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

        def place(name):
            key = callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
            transforms = callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, transforms))

        acc, b = (memory.get_buffer_content(*place(name), thread, logging_info=info)[0] for name in ("acc", "b"))
        total = acc + np.matmul(a, b, dtype=acc.dtype)
        memory.store_buffer_content(*place("acc"), total, thread, logging_info=info)
        return token

    callbacks.wgmma = wgmma


def together(columns, tile, block, shape, m, cluster, dtype=jnp.bfloat16, lines=0, sharing=1, registers=0):
    """Programs that hold several lines of y, of which the last group is not full."""
    WANTED.discard("dW")
    from_registers()

    def config(m, features, inner, width, *_):
        held = lines or columns * tile[0] // width
        ways = {"cluster": cluster, "sharing": sharing, "registers": registers}
        return configs.Union(64, *tile, columns, 2, 2, band=1, lines=held, **ways)

    configs.for_gather = config
    products(shape, block, m, dtype)


def pieces(config, shape, block, m, dtype):
    """Programs that sum several pieces of the weight gradient, also under vmap."""
    WANTED.intersection_update({"dW"})
    configs.for_sample = lambda *_: config
    products(shape, block, m, dtype)
    pattern = BlockPattern.banded((128, 64), 1, block)
    x, dy = testing.normal(0, (2, 40, 128), dtype), testing.normal(1, (2, 40, 64), dtype)
    one = functools.partial(mosaic.sddmm, shape=pattern.shape, block=pattern.block)
    got = jax.vmap(lambda x, dy: one(x, dy, pattern.index))(x, dy)
    assert jnp.array_equal(got[1], one(x[1], dy[1], pattern.index))


def alone(shape, block, m, dtype):
    """Programs that hold two blocks of the weight gradient, where others may be taken."""
    with configs.line_by_line():
        products(shape, block, m, dtype)


CASES = {
    "blocks of 64, every size ragged": lambda: alone((200, 300), (64, 64), 100, jnp.bfloat16),
    "blocks of 128": lambda: products((384, 256), (128, 128), 129, jnp.float16),
    "blocks of 64x128": lambda: products((256, 384), (64, 128), 8, jnp.bfloat16),
    "blocks of 16x32": lambda: alone((100, 130), (16, 32), 7, jnp.float16),
    "block-diagonal": lambda: (diagonal(3, (64, 256), 72, jnp.bfloat16), epilogues(), mapped()),
    "clusters": clusters,
    "lines together": lambda: together(4, (64, 64), (64, 64), (200, 360), 200, 2),
    "lines together, in parts": lambda: together(4, (32, 32), (64, 32), (192, 160), 72, 1, jnp.float16),
    "lines together, x shared": lambda: together(4, (64, 64), (64, 64), (300, 460), 200, 1, sharing=2),
    "lines together, x and blocks shared": lambda: together(
        4, (32, 32), (32, 32), (290, 420), 200, 2, jnp.float16, lines=3, sharing=2
    ),
    "lines together, x shared, in parts": lambda: together(
        8, (32, 32), (64, 64), (192, 320), 72, 1, lines=3, sharing=2
    ),
    "lines together, x in registers": lambda: together(4, (32, 32), (32, 32), (290, 420), 200, 2, registers=1),
    "lines together, x shared and in registers": lambda: together(
        4, (64, 64), (64, 64), (300, 460), 200, 1, jnp.float16, lines=3, sharing=2, registers=1
    ),
    "pieces together": lambda: pieces(
        configs.Supertile(64, 32, 2, 4, 2, splits=3), (200, 300), (64, 64), 100, jnp.bfloat16
    ),
    "pieces together, of several blocks": lambda: pieces(
        configs.Supertile(32, 32, 2, 6, 2, splits=1), (200, 150), (32, 16), 50, jnp.float16
    ),
}


def in_two_stages(choose):
    """Few programs and few stages, so that on small arrays too each is used again and again."""
    return lambda *sizes: choose(*sizes)._replace(stages=2)


if __name__ == "__main__":
    mosaic.describe = lambda: Device("", multiprocessors=2)
    configs.for_gather, configs.for_sample = map(in_two_stages, (configs.for_gather, configs.for_sample))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        CASES[sys.argv[1]]()
    assert not interpreter.get_races().races_found, "the interpreter saw a race"
