"""Every op under jit, grad, vmap, scan, remat and gradients of gradients; how often it compiles; what it allocates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import mostly_slow

from jaxsparse import BlockPattern, _xla, block_diag_matmul, sddmm, spmm, testing

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
BLOCKS = [8, 1]


def make(key=0, block=8, shape=(40, 48), density=0.4):
    return BlockPattern.random(jax.random.key(key), shape, density=density, block=block)


def operands(pattern, lead=()):
    x = testing.normal(0, (*lead, 6, pattern.shape[0]), jnp.float32)
    return x, testing.normal(1, (*lead, *pattern.values_shape), jnp.float32)


def stack(patterns):
    return jax.tree.map(lambda *a: jnp.stack(a), *patterns)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0)])
def test_vmap_over_x_blocks_and_pattern_in_any_combination(axes, block):
    patterns = [make(k, block) for k in range(3)]
    x, blocks = operands(patterns[0], (3,))
    args = (x, blocks, stack(patterns))
    args = tuple(a if axis == 0 else jax.tree.map(lambda leaf: leaf[0], a) for a, axis in zip(args, axes, strict=True))
    got = jax.vmap(spmm, in_axes=axes)(*args)
    grads = jax.vmap(jax.grad(lambda x, w, p: (spmm(x, w, p) ** 2).sum(), (0, 1)), in_axes=axes)(*args)
    for k in range(3):
        one = [
            jax.tree.map(lambda leaf, k=k: leaf[k], a) if axis == 0 else a for a, axis in zip(args, axes, strict=True)
        ]
        close(got[k], spmm(*one))
        want = jax.grad(lambda x, w, p: (spmm(x, w, p) ** 2).sum(), (0, 1))(*one)
        close(grads[0][k], want[0])
        close(grads[1][k], want[1])


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_and_gradients_with_indices_of_16_bits_give_the_same_bits(axes, rows):
    wide = [make(k, 1) for k in range(3)]
    narrow = [dataclasses.replace(p, row_index=p.row_index.astype(jnp.uint16)) for p in wide]
    x, blocks = operands(wide[0], (3,))
    loss = lambda x, w, p: (spmm(x, w, p) ** 2).sum()  # noqa: E731

    @jax.jit
    def found(*args):
        args = [a if axis == 0 else jax.tree.map(lambda leaf: leaf[0], a) for a, axis in zip(args, axes, strict=True)]
        return [jax.vmap(f, axes)(*args) for f in (spmm, jax.grad(loss, (0, 1)), jax.hessian(loss))]

    x = x[:, :rows]
    jax.tree.map(np.testing.assert_array_equal, found(x, blocks, stack(narrow)), found(x, blocks, stack(wide)))


def test_vmap_of_the_block_diagonal_product_and_of_sddmm():
    w, x = testing.normal(0, (3, 4, 5, 6), jnp.float32), testing.normal(1, (3, 7, 20), jnp.float32)
    close(jax.vmap(block_diag_matmul)(x, w)[1], block_diag_matmul(x[1], w[1]))
    patterns = [make(k) for k in range(3)]
    x, dy = testing.normal(0, (3, 6, 40), jnp.float32), testing.normal(1, (3, 6, 48), jnp.float32)
    close(jax.vmap(sddmm)(x, dy, stack(patterns))[2], sddmm(x[2], dy[2], patterns[2]))


@pytest.mark.parametrize("block", BLOCKS)
def test_scan_over_layers_and_remat_give_the_gradients_of_the_loop(block):
    patterns = [make(k, block, (40, 40)) for k in range(3)]
    x, blocks = operands(patterns[0], (3,))

    def loop(blocks):
        h = x[0]
        for k, p in enumerate(patterns):
            h = jnp.tanh(spmm(h, blocks[k], p))
        return (h**2).sum()

    def scanned(blocks):
        step = jax.checkpoint(lambda h, layer: (jnp.tanh(spmm(h, *layer)), None))
        return (jax.lax.scan(step, x[0], (blocks, stack(patterns)))[0] ** 2).sum()

    got, want = jax.jit(jax.value_and_grad(scanned))(blocks), jax.value_and_grad(loop)(blocks)
    close(got[0], want[0])
    close(got[1], want[1])


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_of_gradients_match_dense(block):
    pattern = make(0, block)
    x, blocks = operands(pattern)

    def penalty(product):  # a gradient penalty: the gradient of a gradient's norm, by x and by the weights
        norm = lambda x, w: (jax.grad(lambda x: jnp.sin(product(x, w)).sum())(x) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(norm, (0, 1)))(x, blocks)

    got, want = penalty(lambda x, w: spmm(x, w, pattern)), penalty(lambda x, w: x @ pattern.to_dense(w))
    jax.tree.map(close, got, want)


def test_gradients_of_sddmm_and_of_the_block_diagonal_product_match_dense():
    pattern = make()
    x, _ = operands(pattern)
    dy = testing.normal(5, (6, 48), jnp.float32)
    grads = lambda f: jax.grad(lambda x, dy: jnp.sin(f(x, dy)).sum(), (0, 1))(x, dy)  # noqa: E731
    jax.tree.map(close, grads(lambda x, dy: sddmm(x, dy, pattern)), grads(lambda x, dy: pattern.gather(x.T @ dy)))
    blocks = testing.normal(1, (4, 10, 12), jnp.float32)
    dense = lambda w: jax.scipy.linalg.block_diag(*w)  # noqa: E731
    penalty = lambda f: jax.grad(  # noqa: E731
        lambda x, w: (jax.grad(lambda w: jnp.sin(f(x, w)).sum())(w) ** 2).sum(), (0, 1)
    )(x, blocks)
    jax.tree.map(close, penalty(block_diag_matmul), penalty(lambda x, w: x @ dense(w)))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_new_pattern_of_equal_size_does_not_recompile(block):
    traced = 0

    @jax.jit
    def step(x, blocks, pattern):
        nonlocal traced
        traced += 1
        return jax.grad(lambda w: (spmm(x, w, pattern) ** 2).sum())(blocks)

    x, blocks = operands(make(0, block))
    patterns, compiled = [make(k, block) for k in range(3)], []
    heard = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        results = [step(x, blocks, pattern) for pattern in patterns]
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert traced == 1 and len(compiled) == 1, compiled
    assert not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("block", BLOCKS)
def test_forty_adam_steps_agree_with_a_masked_dense_layer_at_every_step(block):
    pattern = make(0, block)
    x, blocks = operands(pattern)
    target, optimizer = testing.normal(9, (6, 48), jnp.float32), optax.adam(1e-2)

    @functools.partial(jax.jit, static_argnums=0)
    def step(product, w, state):
        out, pullback = jax.vjp(lambda w: product(x, w), w)
        (grad,) = pullback(out - target)
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(w, updates), state, out, grad

    mask = pattern.to_mask()
    sparse, masked = (lambda x, w: spmm(x, w, pattern)), (lambda x, w: x @ jnp.where(mask, w, 0))
    w, dense = blocks, pattern.to_dense(blocks)
    state, dense_state = optimizer.init(w), optimizer.init(dense)
    for _ in range(40):
        w, state, out, grad = step(sparse, w, state)
        dense, dense_state, want, dense_grad = step(masked, dense, dense_state)
        for a, b in ((out, want), (grad, pattern.gather(dense_grad)), (w, pattern.gather(dense))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jnp.size, state[0].mu) == pattern.nnzb * block * block


# ---- memory: what XLA itself says the compiled training step needs --------------------------------------

BATCH, SIZE = 256, 2048


def temporaries(loss, *args) -> int:
    step = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("backend", ["xla", None])
@pytest.mark.parametrize("block", mostly_slow([16, 32, 128, (64, 16)], 2))
def test_temporaries_of_a_block_sparse_step_are_linear_in_batch_and_nnz(block, backend):
    pattern = make(0, block, (SIZE, SIZE), 0.1)
    x, blocks = jnp.ones((BATCH, SIZE)), jnp.ones(pattern.values_shape)
    got = temporaries(lambda x, w: (spmm(x, w, pattern, backend=backend) ** 2).sum(), x, blocks)
    assert got <= 16 * x.nbytes + 2 * blocks.nbytes  # batch x nnz / block is 1.6 GB for blocks of 16


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("backend", ["xla", None])
def test_temporaries_of_a_block_diagonal_step_are_linear_in_batch(backend):
    x, blocks = jnp.ones((BATCH, SIZE)), jnp.ones((16, SIZE // 16, SIZE // 16))
    got = temporaries(lambda x, w: (block_diag_matmul(x, w, backend=backend) ** 2).sum(), x, blocks)
    assert got <= 8 * x.nbytes + 2 * blocks.nbytes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("backend,density", [("xla", 0.5 * _xla.CHUNKS_BELOW), (None, 0.1)])
def test_temporaries_of_a_chunked_unstructured_step_are_linear_in_batch_and_nnz(backend, density):
    pattern = make(0, 1, (SIZE, SIZE), density)
    x, values = jnp.ones((BATCH, SIZE)), jnp.ones(pattern.values_shape)
    got = temporaries(lambda x, w: (spmm(x, w, pattern, backend=backend) ** 2).sum(), x, values)
    assert got <= 16 * x.nbytes + 4 * values.nbytes  # batch x nnz is 64 MB, in x out is 17 MB


@pytest.mark.usefixtures("optimized")
def test_a_matrix_too_large_to_expand_goes_by_chunks(monkeypatch):
    monkeypatch.setattr(_xla, "DENSE_LIMIT", 1000)
    jax.clear_caches()
    pattern = make(0, 1, (512, 512), 0.5)
    x, values = jnp.ones((8, 512)), testing.normal(0, pattern.values_shape, jnp.float32)
    got = temporaries(lambda x, w: (spmm(x, w, pattern, backend="xla") ** 2).sum(), x, values)
    close(spmm(x, values, pattern, backend="xla"), x @ pattern.to_dense(values))
    close(sddmm(x, x, pattern, backend="xla"), pattern.gather(x.T @ x))
    assert got <= 64 * x.nbytes + 4 * values.nbytes
    jax.clear_caches()


def test_columns_of_very_different_lengths_are_right():
    mask = np.random.default_rng(0).random((256, 512)) < 0.05
    mask[:, 3], mask[:, 100] = True, True
    for block in (1, 4):
        pattern = BlockPattern.from_mask(mask, block)
        x, values = testing.normal(0, (8, 256), jnp.float32), testing.normal(1, pattern.values_shape, jnp.float32)
        close(spmm(x, values, pattern), x @ pattern.to_dense(values))


def symmetric(block):
    """(pattern, values, b) of a positive definite system."""
    kept = BlockPattern.random(jax.random.key(0), (24, 24), density=0.2, block=block).to_mask()
    pattern = BlockPattern.from_mask(kept | kept.T | jnp.eye(24, dtype=bool), block)
    w = jax.random.normal(jax.random.key(1), (24, 24))
    return pattern, pattern.gather(w + w.T + 24 * jnp.eye(24)), jax.random.normal(jax.random.key(2), (24,))


@pytest.mark.parametrize("block", [1, 4])
def test_conjugate_gradients_solve_a_symmetric_system_and_are_differentiable(block):
    pattern, w, b = symmetric(block)
    solve = lambda w, b: jax.scipy.sparse.linalg.cg(lambda x: spmm(x, w, pattern), b)[0]  # noqa: E731
    dense = lambda w, b: jnp.linalg.solve(pattern.to_dense(w).T, b)  # noqa: E731
    close(jax.jit(solve)(w, b), dense(w, b))
    loss = lambda f: lambda w, b: (f(w, b) ** 2).sum()  # noqa: E731
    jax.tree.map(close, *(jax.grad(loss(f), (0, 1))(w, b) for f in (solve, dense)))
    close(jax.vmap(solve, (None, 0))(w, jnp.stack([b, 2 * b])), jnp.stack([dense(w, b), 2 * dense(w, b)]))
    any_b = spmm(b, w, pattern.T)  # of any matrix, by the normal equations
    close(jax.scipy.sparse.linalg.cg(lambda x: spmm(spmm(x, w, pattern), w, pattern.T), any_b)[0], dense(w, b))


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "custom_root"])
def test_other_solvers_are_right(name):
    pattern, w, b = symmetric(1)
    matvec, cg = (lambda x, w=w: spmm(x, w, pattern)), jax.scipy.sparse.linalg.cg
    if name == "custom_root":
        solve = lambda f, x: cg(lambda v: f(v) - f(jnp.zeros(24)), -f(x))[0]  # noqa: E731
        # JAX transposes no cg here, of any product: the tangent's system is solved as a dense one.
        linear = lambda f, y: jnp.linalg.solve(jax.jacfwd(f)(y), y)  # noqa: E731
        root = lambda w: jax.lax.custom_root(lambda x: matvec(x, w) - b, jnp.zeros(24), solve, linear)  # noqa: E731
        close(root(w), jnp.linalg.solve(pattern.to_dense(w).T, b))
        got = jax.grad(lambda w: root(w).sum())(w)
        want = jax.grad(lambda w: jnp.linalg.solve(pattern.to_dense(w).T, b).sum())(w)
    else:
        got = getattr(jax.scipy.sparse.linalg, name)(matvec, b)[0]
        want = jnp.linalg.solve(pattern.to_dense(w).T, b)
    close(got, want)
