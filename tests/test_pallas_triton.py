"""The Triton kernels lower for a GPU that is not here; test_ops.py interprets them against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import BlockPattern, _backends, spmm, testing
from pallas_kernels import interpret, triton

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def lower(f, *shapes):
    """The program of f for an absent H100. Newer versions of JAX ask for a description of it."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 128), (20, 17), (200, 24)], ids=str)
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


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("spmm", "float32", (16, 16), "cpu"), "an NVIDIA GPU, not on cpu"),
        (("spmm", "float64", (16, 16), "cuda"), "float64 is not one of float32"),
        (("spmm", "float32", (8, 16), "cuda"), "block of (8, 16) fills only a part"),
        (("spmm", "float32", (1, 1), "cuda"), "fills only a part"),
    ],
)
def test_why_not_says_what_is_wrong(arguments, words):
    assert words in triton.why_not(*arguments)


def test_a_named_back_end_without_a_kernel_raises():
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.5)
    with pytest.raises(NotImplementedError, match="'interpret' can't run spmm here: there is no kernel for single"):
        spmm(jnp.ones((4, 48)), jnp.ones(pattern.values_shape), pattern, backend="interpret")
    assert interpret.why_not("spmm", "int32", (16, 16), "cpu") is not None
    assert _backends.why_not("triton", platform="tpu", block=(16, 16)) is not None
