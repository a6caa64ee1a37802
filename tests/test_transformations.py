"""Every product, on every back end that runs here, under every transformation of JAX: against the dense product.

The table in the README is that of this file.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sweeps import rows_mostly_slow

from jaxsparse import BlockPattern, block_diag_matmul, exporting, sddmm, spmm, testing, why_not

README = Path(__file__).parent.parent / "README.md"
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] * (k > 0))
    for k, name in enumerate(name for name in ("cpu", "xla", "interpret") if why_not(name) is None)
]
ROWS, IN, OUT = 3, 8, 12
CHECKPOINTS = jax.checkpoint_policies


def patterned(block, transposed=False):
    shape = (OUT, IN) if transposed else (IN, OUT)
    pattern = BlockPattern.random(jax.random.key(0), shape, density=0.4, block=block)
    return pattern.T if transposed else pattern


def draw(seed, *shape, dtype=jnp.float32):
    return testing.normal(seed, shape, dtype)


def of_pattern(pattern):
    """(the product, the same of dense matrices, its operands) of spmm, with bias and activation."""
    f = lambda x, w, b, **how: spmm(x, w, pattern, b, activation="gelu", **how)  # noqa: E731
    dense = lambda x, w, b: jax.nn.gelu(x @ pattern.to_dense(w) + b)  # noqa: E731
    return f, dense, (draw(1, ROWS, IN), draw(2, *pattern.values_shape), draw(3, OUT))


def sampled(pattern):
    f = lambda x, dy, **how: sddmm(x, dy, pattern, **how)  # noqa: E731
    return f, lambda x, dy: pattern.gather(x.T @ dy), (draw(1, ROWS, IN), draw(2, ROWS, OUT))


def diagonal():
    f = lambda x, w, b, **how: block_diag_matmul(x, w, b, activation="silu", **how)  # noqa: E731
    dense = lambda x, w, b: jax.nn.silu(x @ jax.scipy.linalg.block_diag(*w) + b)  # noqa: E731
    return f, dense, (draw(1, ROWS, IN), draw(2, 4, 2, 3), draw(3, OUT))


OPS = {
    "spmm, entries": lambda: of_pattern(patterned(1)),
    "spmm, blocks": lambda: of_pattern(patterned((4, 2))),
    "spmm, transposed": lambda: of_pattern(patterned(1, transposed=True)),
    "sddmm": lambda: sampled(patterned(1)),
    "block_diag_matmul": diagonal,
}


def scalar(f):
    return lambda *a: jnp.sin(f(*a)).sum()


def args(operands):
    return tuple(range(len(operands)))


def others(operands):
    return tuple(0.5 - a for a in operands)


# ---- transformations: each takes a function and its operands, and gives numbers ------------------------------


def linearized(f, *a):
    y, push = jax.linearize(f, *a)
    return y, push(*others(a))


def transposed(f, *a):
    """The transpose of the tangent map in each operand."""
    found = []
    for k in args(a):
        push = jax.linearize(lambda t, k=k: f(*a[:k], t, *a[k + 1 :]), a[k])[1]
        found.append(jax.linear_transpose(push, a[k])(jnp.ones_like(f(*a))))
    return found


def over_every_subset(f, *a):
    """vmap of f and of its gradients, over each subset of the operands."""
    stacked, found = [jnp.stack([t, 0.5 - t]) for t in a], []
    for subset in range(1, 2 ** len(a)):
        axes = tuple(0 if subset >> k & 1 else None for k in args(a))
        chosen = [s if axis == 0 else t for s, t, axis in zip(stacked, a, axes, strict=True)]
        found.append((jax.vmap(f, axes)(*chosen), jax.vmap(jax.grad(scalar(f), args(a)), axes)(*chosen)))
    return found


def scanned(f, *a):
    return jax.lax.scan(lambda c, t: (c + 1, jax.grad(scalar(f), args(a))(*t)), 0, [jnp.stack([t, 0.5 - t]) for t in a])


def remat(f, *a):
    policies = (CHECKPOINTS.dots_saveable, CHECKPOINTS.nothing_saveable, CHECKPOINTS.everything_saveable)
    return [jax.grad(scalar(jax.checkpoint(f, policy=policy)), args(a))(*a) for policy in policies]


def exported(f, *a):
    step = jax.jit(jax.value_and_grad(scalar(f), args(a)))
    return jax.export.export(step, disabled_checks=exporting.disabled_checks())(*a).call(*a)


def on_a_mesh(kind):
    def transformed(f, *a):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(scalar(f), args(a)))(*a)

    return transformed


def shard_mapped(f, *a):
    mesh, spec = jax.make_mesh((1,), ("data",)), PartitionSpec()
    step = lambda *a: jax.grad(scalar(f), args(a))(*a)  # noqa: E731
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(*a)


TRANSFORMATIONS = {
    "grad": lambda f, *a: jax.grad(scalar(f), args(a))(*a),
    "jvp": lambda f, *a: jax.jvp(f, a, others(a)),
    "linearize": linearized,
    "linear_transpose": transposed,
    "jacfwd": lambda f, *a: jax.jacfwd(f, args(a))(*a),
    "jacrev": lambda f, *a: jax.jacrev(f, args(a))(*a),
    "hessian": lambda f, *a: jax.hessian(scalar(f), args(a)[:2])(*a),
    "hvp, forward over reverse": lambda f, *a: jax.jvp(jax.grad(scalar(f), args(a)), a, others(a)),
    "hvp, reverse over forward": lambda f, *a: jax.grad(lambda *p: jax.jvp(scalar(f), p, others(a))[1], args(a))(*a),
    "hvp, reverse over reverse": lambda f, *a: jax.grad(
        lambda *p: sum((g * t).sum() for g, t in zip(jax.grad(scalar(f), args(a))(*p), others(a), strict=True)), args(a)
    )(*a),
    "vmap over every subset of operands": over_every_subset,
    "scan": scanned,
    "remat, with policies": remat,
    "export": exported,
    "shard_map, checked": shard_mapped,
    "jit on an automatic mesh": on_a_mesh(jax.sharding.AxisType.Auto),
    "jit on an explicit mesh": on_a_mesh(jax.sharding.AxisType.Explicit),
    "eval_shape": lambda f, *a: jax.tree.map(lambda t: np.zeros(t.shape, t.dtype), jax.eval_shape(f, *a)),
}
DTYPES = {"float64": jnp.float64, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@functools.cache
def wanted(op, transformation):
    _, dense, operands = OPS[op]()
    if transformation == "eval_shape":
        return np.zeros_like(dense(*operands))
    alone = {"export": "value and grad", "shard_map, checked": "grad"}.get(transformation, transformation)
    alone = "grad" if alone.startswith("jit on") else alone
    if alone == "value and grad":
        return jax.value_and_grad(scalar(dense), args(operands))(*operands)
    return compiled(alone, dense, operands)


def compiled(transformation, f, operands):
    """The transformation as one program, unless it makes programs of its own."""
    function = functools.partial(TRANSFORMATIONS[transformation], f)
    own = transformation in ("export", "eval_shape", "shard_map, checked") or transformation.startswith("jit on")
    return function(*operands) if own else jax.jit(function)(*operands)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transformation,op", rows_mostly_slow(itertools.product(TRANSFORMATIONS, OPS), 2))
def test_every_transformation_of_every_product_is_that_of_the_dense_one(op, transformation, backend):
    f, _, operands = OPS[op]()
    got = compiled(transformation, functools.partial(f, backend=backend), operands)
    want = wanted(op, transformation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), list_of(got), list_of(want))


def list_of(tree):
    return jax.tree.leaves(tree)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op,name", rows_mostly_slow(itertools.product(OPS, DTYPES), 2))
def test_tangents_and_gradients_in_other_dtypes_are_those_of_the_dense_one(op, name, backend, x64):
    f, dense, operands = OPS[op]()
    operands = tuple(a.astype(DTYPES[name]) for a in operands)
    tolerance = {"float64": 1e-10, "bfloat16": 0.1, "float16": 0.02}[name]
    wide = tuple(a.astype(jnp.float64) for a in operands)
    for transform in (TRANSFORMATIONS["jvp"], TRANSFORMATIONS["grad"]):
        got = list_of(transform(functools.partial(f, backend=backend), *operands))
        assert all(a.dtype == DTYPES[name] for a in got)
        for a, b in zip(got, list_of(transform(dense, *wide)), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float64), b, rtol=tolerance, atol=tolerance)


def table() -> str:
    """The README's: a line for every transformation, a column for every product."""
    products = "`spmm`", "`sddmm`", "`block_diag_matmul`"
    rows = [*TRANSFORMATIONS, f"{', '.join(DTYPES)}"]
    lines = [f"| | {' | '.join(products)} |", "| --- " * 4 + "|", *(f"| {row} | yes | yes | yes |" for row in rows)]
    return "\n".join(lines)


def test_the_readme_has_the_table_of_this_file():
    assert table() in README.read_text(), f"the README should hold\n{table()}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, (4, 2)])
def test_the_plain_products_are_transposed_as_they_are(block, backend):
    p, how = patterned(block), {"backend": backend}
    x, w, dy, y = draw(1, ROWS, IN), draw(2, *p.values_shape), draw(3, ROWS, OUT), draw(4, ROWS, OUT)
    blocks = draw(5, 4, 2, 3)
    for ours, dense, operand, cotangent in (
        (lambda x: spmm(x, w, p, **how), lambda x: x @ p.to_dense(w), x, y),
        (lambda w: spmm(x, w, p, **how), lambda w: x @ p.to_dense(w), w, y),
        (lambda x: sddmm(x, dy, p, **how), lambda x: p.gather(x.T @ dy), x, w),
        (lambda dy: sddmm(x, dy, p, **how), lambda dy: p.gather(x.T @ dy), dy, w),
        (lambda x: block_diag_matmul(x, blocks, **how), lambda x: x @ jax.scipy.linalg.block_diag(*blocks), x, y),
        (lambda b: block_diag_matmul(x, b, **how), lambda b: x @ jax.scipy.linalg.block_diag(*b), blocks, y),
        (
            lambda y: jax.vjp(lambda x, w: spmm(x, w, p, **how), x, w)[1](y),
            lambda y: (y @ p.to_dense(w).T, p.gather(x.T @ y)),
            y,
            (x, w),
        ),
    ):
        got, want = (jax.linear_transpose(f, operand)(cotangent) for f in (ours, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_an_activation_is_no_linear_function():
    p = patterned(1)
    transpose = jax.linear_transpose(
        lambda x: spmm(x, draw(2, *p.values_shape), p, activation="relu"), draw(1, ROWS, IN)
    )
    with pytest.raises(ValueError, match="not linear, so it has no transpose"):
        transpose(draw(3, ROWS, OUT))
