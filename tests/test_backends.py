"""Back ends are chosen per platform, never in silence when named, and the chosen kernel is in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from jaxsparse import BlockPattern, _backends, _xla, block_diag_matmul, sddmm, spmm, why_not
from pallas_kernels import mosaic, triton

PATTERN = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3, block=8)
X, W = jnp.ones((4, 48)), jnp.ones(PATTERN.values_shape)
needs_cpu = pytest.mark.skipif(why_not("cpu") is not None, reason=f"cpu: {why_not('cpu')}")


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
        return _backends.choose(op, None, jnp.dtype("bfloat16"), (64, 64), "cuda")

    assert chosen("spmm") == "xla"  # nothing has been timed on a GPU
    monkeypatch.setitem(_backends._PREFERRED, "cuda", ("mosaic", "triton"))
    for module in (triton, mosaic):
        monkeypatch.setattr(module, "why_not", lambda *_: "there is no such GPU")
    assert chosen("spmm") == "xla"
    for name, module in (("triton", triton), ("mosaic", mosaic)):
        monkeypatch.setattr(module, "why_not", lambda *_: None)
        assert chosen("spmm") == chosen("sddmm") == name
    assert chosen("block_diag_matmul") == "xla"


def test_xla_by_name_is_plain_xla():
    assert "jaxsparse_cpu" not in jax.jit(step("xla")).lower(X, W).as_text()


def test_a_named_back_end_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "why_not", lambda *_: "the library was not built")
    with pytest.raises(NotImplementedError, match="'cpu' can't run spmm here: the library was not built"):
        jax.jit(lambda x, w: spmm(x, w, PATTERN, backend="cpu"))(X, W)


def test_without_its_kernels_every_platform_goes_to_xla(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "why_not", lambda *_: "the library was not built")
    text = jax.jit(lambda x, w: spmm(x, w, PATTERN)).lower(X, W).as_text()
    assert "jaxsparse_cpu" not in text and "while" in text


def test_why_not_says_what_is_missing_and_refuses_unknown_names():
    assert why_not("xla") is None
    assert "run on a CPU, not on cuda" in str(why_not("cpu", platform="cuda"))
    assert "int32 is not one of" in str(why_not("cpu", dtype="int32"))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        why_not("gpu")
    with pytest.raises(ValueError, match="unknown op 'nope'.*'sddmm'"):
        why_not("interpret", "nope")
    with pytest.raises(ValueError, match="unknown platform 'metal'.*'cuda'"):
        why_not("cpu", platform="metal")


@pytest.mark.parametrize("backend", _backends.BACKENDS)
def test_a_gpu_has_one_word(backend, monkeypatch):
    assert why_not(backend, platform="gpu") == why_not(backend, platform="cuda")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # what JAX calls it where it is the default
    monkeypatch.setattr(_backends, "_is_rocm", lambda: False)
    assert why_not(backend) == why_not(backend, platform="cuda")
    monkeypatch.setattr(_backends, "_is_rocm", lambda: True)
    assert why_not(backend) == why_not(backend, platform="rocm")


def test_a_program_for_another_platform_holds_the_named_back_end_or_says_why_not():
    exported = lambda backend: jax.export.export(jax.jit(step(backend)), platforms=["cuda"])  # noqa: E731
    with pytest.raises(NotImplementedError, match="'cpu' can't run spmm on cuda: these kernels run on a CPU"):
        exported("cpu")(X, W)
    with pytest.raises(NotImplementedError, match="'triton' can't run spmm on cuda: a block of .8, 8. fills only"):
        exported("triton")(X, W)


def test_each_kernel_is_traced_once(monkeypatch):
    traced = []
    monkeypatch.setattr(_xla, "spmm", lambda *a, inner=_xla.spmm, **how: traced.append(1) or inner(*a, **how))
    function = jax.jit(lambda x, w: spmm(x, w, PATTERN, backend="xla"))
    function(X, W), function(X, W)
    assert len(traced) == 1


def test_outside_jit_a_product_is_one_program_made_once(monkeypatch):
    traced = []
    monkeypatch.setattr(_xla, "spmm", lambda *a, inner=_xla.spmm, **how: traced.append(1) or inner(*a, **how))
    x = jnp.ones((5, 48))  # a shape that no other test has
    for _ in range(3):
        spmm(x, W, PATTERN, backend="xla")
    assert len(traced) == 1


def test_the_choice_holds_under_vmap_and_scan():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (W, PATTERN))
    batched = jax.jit(jax.vmap(lambda w, p: spmm(X, w, p)))(*stacked)
    _, scanned = jax.lax.scan(lambda c, layer: (c, spmm(X, *layer)), 0, stacked)
    np.testing.assert_allclose(batched, scanned, rtol=1e-6)
