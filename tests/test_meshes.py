"""Products over a mesh of devices: what they send, counted in the compiled program, and what each device computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import devices
import pytest

pytestmark = pytest.mark.slow  # eight devices in processes of their own
COMPILER = os.environ.get("JAXSPARSE_GPU_COMPILER", "")  # see mosaic_compiled.py
KINDS = "automatic", "explicit"
PREPARED = """
import contextlib, re, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsparse import BlockPattern, block_diag_matmul, sddmm, spmm

explicit = KIND == "explicit"
draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
x, bias, blocks = draw(0, 16, 48), draw(1, 32), draw(2, 8, 6, 4)
entries, tiles = (BlockPattern.random(jax.random.key(3), (48, 32), density=0.3, block=b) for b in (1, 8))
SENT = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
NONE, ONE = {}, {"all-reduce": 1}


def mesh_of(**axes):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def compiled(mesh, function, operands, specs):
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(operands, specs, strict=True)]
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        program = jax.jit(function).lower(*placed).compile()
        return program, program(*placed)


def sent(program):
    text = program.as_text()
    return {name: n for name in SENT if (n := len(re.findall(rf" {name}(?:-start)?\\(", text)))}


data, both = mesh_of(data=8), mesh_of(data=2, model=4)
"""
COUNTED = """
def check(mesh, f, operands, specs, forward, gradients, out):
    loss, all = lambda *a: jnp.sin(f(*a)).sum(), tuple(range(len(operands)))
    for function, want, lie in ((f, forward, [out]), (jax.grad(loss, all), gradients, specs)):
        program, got = compiled(mesh, function, operands, specs)
        assert sent(program) == want, (sent(program), want)
        where = [s.spec for s in jax.tree.leaves(program.output_shardings)]
        for spec, want in zip(where, lie, strict=True):
            assert [*spec, *(None,) * 3][:3] == [*want, *(None,) * 3][:3], (where, lie)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, function(*operands))


for backend, patterns in ((None, (entries, tiles)), ("xla", (entries, tiles)), ("interpret", (entries,))):
    how = {"activation": "gelu", "backend": backend}
    for pattern in patterns:
        f = lambda x, w, b, p=pattern: spmm(x, w, p, b, **how)
        w = draw(4, *pattern.values_shape)
        for mesh, rows in ((data, P("data")), (both, P(("data", "model"))))[: 1 if backend == "interpret" else 2]:
            check(mesh, f, (x, w, bias), (rows, P(), P()), NONE, ONE, rows)
        # Sequences, of which both the batch and the length are split.
        stacked = P("data", "model"), P()
        check(both, lambda x, w: f(x, w, bias), (x.reshape(4, 4, 48), w), stacked, NONE, ONE, P("data", "model"))
    f = lambda x, w, b: block_diag_matmul(x, w, b, **how)
    check(data, f, (x, blocks, bias), (P("data"), P(), P()), NONE, ONE, P("data"))
    check(data, f, (x, blocks, bias), (P(None, "data"), P("data"), P("data")), NONE, NONE, P(None, "data"))
    by_both = P("data", "model"), P("model"), P("model")
    check(both, f, (x, blocks, bias), by_both, NONE, ONE, P("data", "model"))
print("counted on", len(jax.devices()), "devices")
"""
REFUSED = """
mesh, few = data, draw(1, 12, 4, 4)


def said(function, operands, specs):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            program, got = compiled(mesh, function, operands, specs)
        except ValueError as error:
            return str(error)
    np.testing.assert_allclose(got, function(*operands), rtol=1e-4, atol=1e-4)
    return " ".join(str(w.message) for w in warned)


uneven = said(block_diag_matmul, (x, few), (P(None, "data"), P()))
assert "12 diagonal blocks" in uneven and "12 = 1 x 8 + 4" in uneven and "pad to 16" in uneven, uneven
features = said(lambda x, w: spmm(x, w, tiles), (x, draw(4, *tiles.values_shape)), (P(None, "data"), P()))
assert "each row is multiplied whole" in features and "BlockPattern.split" in features, features
print("told")
"""
WORK = """
def step(x, w):
    return jax.grad(lambda x, w: (block_diag_matmul(x, w, backend="xla") ** 2).sum(), (0, 1))(x, w)


x, blocks = draw(0, 64, 512), draw(1, 8, 64, 64)
whole = jax.jit(step).lower(x, blocks).compile().cost_analysis()
for specs in ((P("data"), P()), (P(None, "data"), P("data"))):
    program, _ = compiled(data, step, (x, blocks), specs)
    assert program.cost_analysis()["flops"] < 0.14 * whole["flops"], (program.cost_analysis(), whole)
dy = draw(2, 64, 32)
dw = lambda x, dy: sddmm(x[:, :48], dy, entries, backend="xla")
whole = jax.jit(dw).lower(x, dy).compile().cost_analysis()["flops"]
assert compiled(data, dw, (x, dy), (P("data"), P("data")))[0].cost_analysis()["flops"] < 0.2 * whole
print("an eighth of the work")
"""


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in KINDS])
def done(request) -> subprocess.CompletedProcess:
    """One process with eight devices, which does all that this file asks of a kind of mesh."""
    return devices.run(8, "-c", f"KIND = {request.param!r}\n{PREPARED}{COUNTED}{REFUSED}{WORK}")


def test_products_send_what_their_sums_need_and_no_more(done):
    assert "counted on 8 devices" in done.stdout, done.stderr[-4000:]


def test_what_can_not_be_shared_evenly_is_told_with_the_numbers(done):
    assert "told" in done.stdout, done.stderr[-4000:]


def test_each_of_eight_devices_computes_an_eighth(done):
    assert done.returncode == 0 and "an eighth of the work" in done.stdout, done.stderr[-4000:]


@pytest.mark.skipif(not COMPILER, reason="JAXSPARSE_GPU_COMPILER names no folder with XLA's compiler for GPUs")
def test_programs_for_eight_gpus_send_the_same():
    command = [sys.executable, Path(__file__).with_name("mesh_compiled.py"), COMPILER]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout)
    cells = {f"{mesh}, {cell}": sent for mesh, found in counted.items() for cell, sent in found.items()}
    assert len(cells) == 16
    for cell, sent in cells.items():
        # XLA makes one of the two all-reduces, of weight and bias, unless they are of two dtypes.
        times = 2 if "mosaic" in cell else 1
        sums = {} if "diagonal, blocks" in cell else {"all-reduce": times}
        assert sent == {"forward": {}, "gradients": sums}, cell
