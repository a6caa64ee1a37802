"""Back ends are chosen per platform, never in silence when named, and the chosen kernel is in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from jaxsparse import BlockPattern, _backends, _xla, block_diag_matmul, sddmm, spmm
from pallas_kernels import mosaic, triton

PATTERN = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3, block=8)
X, W = jnp.ones((4, 48)), jnp.ones(PATTERN.values_shape)
needs_cpu = pytest.mark.skipif(_backends.why_not("cpu") is not None, reason=f"cpu: {_backends.why_not('cpu')}")


def step(backend):
    return lambda x, w: jax.value_and_grad(lambda x, w: spmm(x, w, PATTERN, backend=backend).sum(), (0, 1))(x, w)


@needs_cpu
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_the_kernels_are_in_the_program_that_runs(backend):
    text = jax.jit(step(backend)).lower(X, W).compile().as_text()
    assert "jaxsparse_cpu_spmm" in text and "jaxsparse_cpu_sddmm" in text
    dy = jnp.ones((4, 32))
    assert "jaxsparse_cpu_sddmm" in jax.jit(lambda: sddmm(X, dy, PATTERN, backend=backend)).lower().as_text()
    blocks = jnp.ones((4, 12, 8))
    text = jax.jit(jax.grad(lambda w: block_diag_matmul(X, w, backend=backend).sum())).lower(blocks).as_text()
    assert "jaxsparse_cpu_block_diag_outer" in text


@needs_cpu
def test_both_gradients_of_an_unstructured_weight_are_one_kernel_and_one_alone_is_not():
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3)
    loss = lambda x, w: spmm(x, w, pattern).sum()  # noqa: E731
    values = jnp.ones(pattern.values_shape)
    both = jax.jit(jax.grad(loss, (0, 1))).lower(X, values).as_text()
    weight = jax.jit(jax.grad(loss, 1)).lower(X, values).as_text()
    assert "jaxsparse_cpu_spmm_grads" in both
    assert "jaxsparse_cpu_spmm_grads" not in weight and "jaxsparse_cpu_sddmm" in weight


def test_a_program_for_another_platform_has_no_cpu_kernel():
    exported = jax.export.export(jax.jit(step(None)), platforms=["cuda"])(X, W)
    assert "jaxsparse_cpu" not in exported.mlir_module()


def test_a_gpu_takes_the_best_known_kernel_that_can_run_and_leaves_block_diagonals_to_xla(monkeypatch):
    def chosen(op):
        return _backends._Product(op, None, jnp.dtype("bfloat16"), (64, 64), ())("cuda").func

    assert chosen("spmm") is _xla.spmm  # nothing has been timed on a GPU
    monkeypatch.setitem(_backends._PREFERRED, "cuda", ("mosaic", "triton"))
    for module in (triton, mosaic):
        monkeypatch.setattr(module, "why_not", lambda *_: "there is no such GPU")
    assert chosen("spmm") is _xla.spmm
    for module in (triton, mosaic):
        monkeypatch.setattr(module, "why_not", lambda *_: None)
        assert chosen("spmm") is module.spmm and chosen("sddmm") is module.sddmm
    assert chosen("block_diag_matmul") is _xla.block_diag_matmul


def test_xla_by_name_is_plain_xla():
    assert "jaxsparse_cpu" not in jax.jit(step("xla")).lower(X, W).as_text()


def test_a_named_back_end_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "why_not", lambda *_: "the library was not built")
    with pytest.raises(NotImplementedError, match="'cpu' can't run spmm here: the library was not built"):
        _backends.call("spmm", "cpu", (8, 8), X, W, PATTERN.index, None, shape=(48, 32), block=(8, 8))


def test_without_its_kernels_every_platform_goes_to_xla(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "why_not", lambda *_: "the library was not built")
    sizes = {"shape": (48, 32), "block": (8, 8)}
    got = _backends.call("spmm", None, (8, 8), X, W, PATTERN.index, None, **sizes)
    np.testing.assert_array_equal(got, _xla.spmm(X, W, PATTERN.index, **sizes))


def test_why_not_says_what_is_missing_and_refuses_unknown_names():
    assert _backends.why_not("xla") is None
    assert "run on a CPU, not on cuda" in str(_backends.why_not("cpu", platform="cuda"))
    assert "int32 is not one of" in str(_backends.why_not("cpu", dtype="int32"))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        _backends.why_not("gpu")


def test_the_choice_holds_under_vmap_and_scan():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (W, PATTERN))
    batched = jax.jit(jax.vmap(lambda w, p: spmm(X, w, p)))(*stacked)
    _, scanned = jax.lax.scan(lambda c, layer: (c, spmm(X, *layer)), 0, stacked)
    np.testing.assert_allclose(batched, scanned, rtol=1e-6)
