"""The Triton kernels lower for a GPU that is not here; test_ops.py interprets them against the oracle."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run

from jaxsparse import BlockPattern, _backends, reference, spmm, testing
from pallas_kernels import interpret, triton
from pallas_kernels.triton import crossover, entries

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
COMPILER = os.environ.get("JAXSPARSE_GPU_COMPILER", "")  # see mosaic_compiled.py


def lower(f, *shapes):
    """The program of f for an absent H100. Newer versions of JAX ask for a description of it."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def swept(first, *axes):
    """All combinations as parameters, of which the first is always run, and the rest in a sweep."""
    rest = (each for each in itertools.product(*axes) if each != first)
    return [first, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


BLOCKS = [(16, 16), (32, 64), (128, 128), (20, 17), (200, 24)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("block,dtype", swept(((20, 17), jnp.bfloat16), BLOCKS, DTYPES))
def test_every_product_lowers_for_a_gpu(block, dtype):
    pattern = BlockPattern.random(jax.random.key(0), (300, 400), density=0.4, block=block)
    sizes = {"shape": pattern.shape, "block": block}
    x, dy, w, bias = (jax.ShapeDtypeStruct(s, dtype) for s in ((100, 300), (100, 400), pattern.values_shape, (400,)))
    for activation, precision in ((None, None), ("relu", "highest"), ("gelu", "default"), ("silu", None)):
        how = {"activation": activation, "precision": precision, **sizes}
        f = lambda x, w, b, how=how: triton.spmm(x, w, pattern.index, b, **how)  # noqa: E731
        assert "jaxsparse_gather" in lower(f, x, w, bias)
    transposed = lambda dy, w: triton.spmm(dy, w, pattern.index, transposed=True, **sizes)  # noqa: E731
    assert "jaxsparse_gather" in lower(transposed, dy, w)
    assert "jaxsparse_sample" in lower(lambda x, dy: triton.sddmm(x, dy, pattern.index, **sizes), x, dy)


@pytest.mark.parametrize("i,o", [(64, 64), (33, 7)])
def test_the_block_diagonal_pair_lowers_for_a_gpu(i, o):
    x, dy, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((100, 4 * i), (100, 4 * o), (4, i, o)))
    assert "jaxsparse_gather" in lower(triton.block_diag_matmul, x, w)
    assert "jaxsparse_sample" in lower(lambda x, dy: triton.block_diag_outer(x, dy, 4), x, dy)


def test_a_stack_of_layers_is_mapped():
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.5, block=16)
    x, blocks = testing.normal(0, (3, 5, 48), jnp.float32), testing.normal(1, (3, *pattern.values_shape), jnp.float32)
    got = jax.vmap(lambda x, w: spmm(x, w, pattern, backend="interpret"))(x, blocks)
    np.testing.assert_allclose(got[1], spmm(x[1], blocks[1], pattern), rtol=1e-5, atol=1e-5)


def narrowed(pattern):
    """The same pattern with 16-bit indices."""
    return dataclasses.replace(pattern, row_index=pattern.row_index.astype(jnp.uint16))


@pytest.mark.parametrize("m,dtype", swept((100, jnp.bfloat16), [1, 100], DTYPES))
def test_products_of_single_entries_lower_for_a_gpu(m, dtype):
    pattern = BlockPattern.random(jax.random.key(0), (300, 400), density=0.1)
    sizes = {"shape": pattern.shape, "block": (1, 1)}
    x, dy, w, bias = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, 300), (m, 400), pattern.values_shape, (400,)))
    for index in (pattern.index, narrowed(pattern).index):
        f = lambda x, w, b, index=index: triton.spmm(x, w, index, b, activation="gelu", **sizes)  # noqa: E731
        assert "jaxsparse_gather_entries" in lower(f, x, w, bias)
        grads = lambda x, dy, w, index=index: triton.spmm_grads(x, dy, w, index, **sizes)  # noqa: E731
        text = lower(grads, x, dy, w)
        assert "jaxsparse_gather_entries" in text and "jaxsparse_sample_entries" in text


# Several lines at once; several chunks of a line; several parts of the batch.
@pytest.mark.parametrize(
    "m,tile,activation", [(1, (8, 64, 1), "gelu"), (40, (1, 32, 64), "relu"), (150, (1, 32, 64), "silu")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_every_tile_of_single_entries_is_summed_and_finished(m, tile, activation, dtype):
    mask = np.random.default_rng(0).random((90, 43)) < np.linspace(0, 1, 43)  # empty, short and full lines
    pattern, act = BlockPattern.from_mask(mask), getattr(jax.nn, activation)
    assert entries.choose_tile(m, 90, 43, pattern.nnzb, jnp.dtype(dtype).itemsize) == tile
    x, w, b, _ = testing.inputs(testing.Case("", lambda: pattern, (m,)), pattern, dtype)
    got = spmm(x, w, narrowed(pattern), b, activation=activation, backend="interpret")
    truth = act((reference.spmm(x, w, pattern) + np.asarray(b, np.float64)).astype(np.float32))
    dense = act((x @ pattern.to_dense(w) + b).astype(jnp.float32)).astype(dtype)
    testing.assert_as_close_as_dense(got, truth, dense)


@pytest.mark.parametrize("backend", ["interpret", "xla", None])
def test_indices_of_16_bits_give_the_same_bits(backend):
    pattern = BlockPattern.random(jax.random.key(0), (65_536, 6), density=0.001)
    x, w = testing.normal(0, (2, 65_536), jnp.float32), testing.normal(1, pattern.values_shape, jnp.float32)

    @jax.jit
    def products(pattern):
        y, back = jax.vjp(lambda w: spmm(x, w, pattern, backend=backend), w)
        return y, back(y)

    jax.tree.map(np.testing.assert_array_equal, products(pattern), products(narrowed(pattern)))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="triton: JAXSPARSE_GPU_COMPILER names no folder with XLA's compiler for GPUs")
def test_compiled_kernels_spill_nothing_and_gather_whole_rows_or_use_tensor_cores(tmp_path):
    command = [sys.executable, Path(__file__).with_name("triton_compiled.py"), COMPILER, tmp_path]
    done = run(command, {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert "register spilling" in result.pop("a tile that is too large")["refused"]
    assert "refused" not in str(result), result
    assert all(said["loads of 16 bytes"] for said in result["entries"].values()), result
    assert all(said["tensor cores"] for said in result["blocks"].values()), result


def test_the_crossover_is_where_bytes_and_operations_put_it():
    size = 4096 * 4096
    for index, most in ((4, 2 / 0.6), (2, 2 / 0.4)):  # bytes of an entry against those of ten dense weights
        gain = crossover.dense_seconds(1, (4096, 4096)) / crossover.seconds(1, (4096, 4096), size // 10, index=index)
        assert 0.99 * most < gain <= most
    for density in (0.05, 0.1, 0.25):
        wins = [crossover.worth_it(m, density) for m in (1, 2, 4, 8, 16, 32, 64, 128, 8192)]
        assert wins == sorted(wins, reverse=True) and wins[0] and not wins[-1]
    assert not crossover.worth_it(1, 0.4) and crossover.worth_it(1, 0.4, index=2)
    assert not crossover.worth_it(16, 0.1, transposed=True)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("spmm", "float32", (16, 16), "cpu"), "an NVIDIA GPU, not on cpu"),
        (("spmm", "float64", (16, 16), "cuda"), "float64 is not one of float32"),
        (("spmm", "float32", (8, 16), "cuda"), "block of (8, 16) fills only a part"),
        (("spmm", "float32", (1, 1), "cuda"), "this machine has no NVIDIA GPU"),
    ],
)
def test_why_not_says_what_is_wrong(arguments, words):
    assert words in triton.why_not(*arguments)


def test_a_named_back_end_that_can_not_run_raises():
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.5)
    with pytest.raises(NotImplementedError, match="'triton' can't run spmm here: .* an NVIDIA GPU"):
        spmm(jnp.ones((4, 48)), jnp.ones(pattern.values_shape), pattern, backend="triton")
    assert interpret.why_not("spmm", "int32", (16, 16), "cpu") is not None
    assert _backends.why_not("triton", platform="tpu", block=(16, 16)) is not None
