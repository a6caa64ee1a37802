"""Exported programs: one platform and several, any batch size, in the process that made them and in a fresh one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import BlockPattern, block_diag_matmul, exporting, spmm, why_not

PATTERN = BlockPattern.random(jax.random.key(0), (48, 32), density=0.3, block=(1, 1))
BLOCKS = BlockPattern.random(jax.random.key(0), (32, 16), density=0.5, block=8)
PLATFORMS = [["cpu"], ["cpu", "cuda", "tpu"]]
needs_cpu = pytest.mark.skipif(why_not("cpu") is not None, reason=f"cpu: {why_not('cpu')}")


def model(params, x):
    x = spmm(x, params[0], PATTERN, activation="relu")
    return block_diag_matmul(spmm(x, params[1], BLOCKS), params[2])


def made():
    key = jax.random.key(1)
    return [jax.random.normal(key, shape) for shape in (PATTERN.values_shape, BLOCKS.values_shape, (4, 4, 3))]


def export(platforms, function=model):
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), made())
    make = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=exporting.disabled_checks())
    return make(shapes, jax.ShapeDtypeStruct((batch, 48), jnp.float32))


@pytest.mark.parametrize("platforms", PLATFORMS, ids=str)
def test_an_exported_program_takes_any_batch(platforms):
    exported = export(platforms)
    for rows in (1, 5):
        x = jax.random.normal(jax.random.key(2), (rows, 48))
        np.testing.assert_allclose(exported.call(made(), x), model(made(), x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize("platforms", PLATFORMS, ids=str)
def test_a_fresh_process_runs_and_differentiates_what_was_written(platforms, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes programs with the package flatbuffers")
    (tmp_path / "program").write_bytes(export(platforms).serialize(vjp_order=1))
    x = jax.random.normal(jax.random.key(2), (5, 48))
    np.savez(tmp_path / "arrays.npz", x=x, **{f"p{k}": p for k, p in enumerate(made())})
    code = """
import sys, jax, numpy as np
from jaxsparse import exporting
folder = sys.argv[1]
exporting.register()
call = jax.export.deserialize(open(folder + "/program", "rb").read()).call
a = np.load(folder + "/arrays.npz")
params, x = [a["p0"], a["p1"], a["p2"]], a["x"]
gradients = jax.grad(lambda p: (call(p, x) ** 2).sum())(params)
np.savez(folder + "/out.npz", y=call(params, x), **{f"g{k}": g for k, g in enumerate(gradients)})
assert "jaxsparse.ops" not in sys.modules
"""
    if why_not("cpu") is not None:
        code = code.replace("exporting.register()\n", "")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    got = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(got["y"], model(made(), x), rtol=1e-5, atol=1e-5)
    for k, want in enumerate(jax.grad(lambda p: (model(p, x) ** 2).sum())(made())):
        np.testing.assert_allclose(got[f"g{k}"], want, rtol=1e-4, atol=1e-4)


@needs_cpu
def test_without_the_line_jax_refuses_and_names_the_call():
    with pytest.raises(ValueError, match="jaxsparse_cpu_spmm"):
        jax.export.export(jax.jit(lambda x, w: spmm(x, w, PATTERN)))(jnp.ones((2, 48)), made()[0])


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_a_platform_without_our_kernels_gets_no_call_of_ours(platform):
    step = jax.grad(lambda p, x: (model(p, x) ** 2).sum())
    assert "jaxsparse_cpu" in export(["cpu"], step).mlir_module() or why_not("cpu")
    assert "jaxsparse_" not in export([platform], step).mlir_module()
