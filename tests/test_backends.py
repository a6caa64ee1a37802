"""Back ends are chosen per platform, never in silence when named, and the chosen kernel is in the program."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from jaxsparse import BlockPattern, _backends, _measured, _xla, block_diag_matmul, sddmm, spmm, why_not
from pallas_kernels import mosaic

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


ROWS = {  # of a kernel: a product of rows, which vmap hands it one after the other if nobody folds them
    "spmm": lambda x: spmm(x, W, PATTERN),
    "spmm, both ways": jax.grad(lambda x: jnp.square(spmm(x, W, PATTERN)).sum()),
    "block_diag_matmul": lambda x: block_diag_matmul(x, jnp.ones((4, 12, 8))),
}


@needs_cpu
@pytest.mark.parametrize("name", ROWS)
def test_rows_under_vmap_are_one_call_of_the_kernel(name):
    alone, batched = (jax.jit(f).lower(X).as_text() for f in (ROWS[name], jax.vmap(ROWS[name])))
    call = f"custom_call @jaxsparse_cpu_{name.partition(',')[0]}"
    assert alone.count(call) == batched.count(call) > 0 and "while" not in batched


@needs_cpu
def test_both_gradients_of_an_unstructured_weight_are_one_kernel_and_one_alone_is_not():
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3)
    loss = lambda x, w: spmm(x, w, pattern).sum()  # noqa: E731
    values = jnp.ones(pattern.values_shape)
    both = jax.jit(jax.grad(loss, (0, 1))).lower(X, values).as_text()
    weight = jax.jit(jax.grad(loss, 1)).lower(X, values).as_text()
    assert "jaxsparse_cpu_spmm_grads" in both
    assert "jaxsparse_cpu_spmm_grads" not in weight and "jaxsparse_cpu_sddmm" in weight


@needs_cpu
@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2,)], ids=str)
def test_a_program_of_one_row_reads_indices_of_16_bits_as_they_are(batch, backend):
    pattern = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3)
    pattern = dataclasses.replace(pattern, row_index=pattern.row_index.astype(jnp.uint16))
    w, bias = jnp.ones(pattern.values_shape), jnp.ones(32)

    def product(x, w, p, b=None):
        return spmm(x, w, p, b, activation="gelu", backend=backend)

    def texts(f, *operands):
        lowered = jax.jit(f).lower(*operands)
        both = lowered.as_text(), lowered.compile().as_text()
        assert all("jaxsparse_cpu_spmm" in text for text in both)
        return both

    x, dy = (jnp.ones((*batch, features)) for features in pattern.shape)
    for text in texts(product, x, w, pattern, bias):
        assert ("convert" in text) == (batch == (2,))
    as_constant = texts(lambda x, w, b: product(x, w, pattern, b), x, w, bias)
    assert "convert" not in as_constant[1]
    assert not any("convert" in text for text in texts(product, dy, w, pattern.T))


def test_a_program_for_another_platform_has_no_cpu_kernel():
    exported = jax.export.export(jax.jit(step(None)), platforms=["cuda"])(X, W)
    assert "jaxsparse_cpu" not in exported.mlir_module()


def a_gpu(kind="NVIDIA H100 80GB HBM3"):
    """Programs are for this kind of GPU inside; there need not be one."""
    device = jax.sharding.AbstractDevice
    platform = {"platform": "gpu"} if "platform" in inspect.signature(device).parameters else {}
    abstract = device(device_kind=kind, num_cores=132, **platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract))


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(_measured, "TABLE", tmp_path / "measured.json")
    _measured._results.cache_clear()
    yield _measured.TABLE
    _measured._results.cache_clear()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_gpu_takes_the_kernel_that_was_measured_to_win_and_says_so_in_the_program(table):
    pattern = BlockPattern.random(jax.random.key(0), (64, 64), density=0.5, block=16)
    x, w = jnp.ones((128, 64), jnp.bfloat16), jnp.ones(pattern.values_shape, jnp.bfloat16)

    def program():
        with a_gpu():
            # a new function each time: JAX keeps what it traced and lowered
            return jax.jit(lambda x, w: spmm(x, w, pattern)).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" not in program()  # nothing is measured
    work = _measured.Workload("spmm", "bfloat16", (32, 32), 256, 0.25)
    _measured.write("NVIDIA H100 80GB HBM3", [_measured.Result(work, "triton", 1.4, "made up")])
    assert "triton" in program()
    _measured.write("NVIDIA H100 80GB HBM3", [_measured.Result(work, "xla", 1.0, "made up")])
    assert "triton" not in program()


def test_what_was_measured_nearest_decides_and_nothing_far_away(table):
    def result(op, block, rows, density, backend, dtype="bfloat16"):
        return _measured.Result(_measured.Workload(op, dtype, (block, block), rows, density), backend, 2.0, "made up")

    blocks = [result("spmm", 64, 8192, 0.25, "mosaic"), result("spmm", 64, 512, 0.25, "triton")]
    entries = [result("spmm", 1, 1, 0.1, "triton"), result("spmm", 1, 2048, 0.1, "xla")]
    _measured.write("GPU", blocks + entries)

    def chosen(block, rows, density=0.25, op="spmm", dtype="bfloat16", kind="GPU"):
        near = _measured.nearest(kind, _measured.Workload(op, dtype, (block, block), rows, density))
        return near and near.backend

    assert chosen(64, 8192) == chosen(64, 5000) == chosen(128, 8192) == "mosaic"
    assert chosen(64, 512) == chosen(64, 1000) == chosen(32, 512, 0.5) == "triton"
    assert chosen(1, 4, 0.1) == "triton" and chosen(1, 1000, 0.1) == "xla"
    assert chosen(64, 1) is chosen(64, 0) is chosen(64, 512, 0.0) is None
    assert chosen(64, 512, op="sddmm") is chosen(64, 512, dtype="float32") is chosen(64, 512, kind="other") is None
    (rows,) = jax.export.symbolic_shape("b")
    assert chosen(64, rows) is None


def test_a_kernel_that_won_but_can_not_run_leaves_the_product_to_xla(table, monkeypatch):
    work = _measured.Workload("block_diag_matmul", "bfloat16", (64, 64), 512, 0.25)
    _measured.write("GPU", [_measured.Result(work, "mosaic", 1.2, "made up")])
    with a_gpu("GPU"):
        monkeypatch.setattr(mosaic, "why_not", lambda *_: None)
        assert _backends.choose(work, None, "cuda") == "mosaic"
        monkeypatch.setattr(mosaic, "why_not", lambda *_: "there is no such GPU")
        assert _backends.choose(work, None, "cuda") == "xla"
    assert _backends.choose(work, None, "tpu") == "xla"


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
