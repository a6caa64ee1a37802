"""N:M sparsity: the pattern, and its products against the oracle, on every back end that has them."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from sweeps import mostly_slow
from test_transformations import TRANSFORMATIONS, compiled, draw, list_of, of_pattern

import cpu_kernels
import jaxsparse
from jaxsparse import BlockPattern, NMPattern, checkpoint, sddmm, spmm, surgery, testing, why_not

BUILT = why_not("cpu", "n_m_spmm") is None
BACKENDS = [*[None] * BUILT, "xla"]  # None takes x W of C++, which has no sampled product, and x^T dy of XLA
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
CASES = {  # (n, m), (in, out), leading dimensions
    "2:4": ((2, 4), (64, 48), (24,)),
    "2:4, several panels": ((2, 4), (72, 130), (9,)),
    "2:4, ragged": ((2, 4), (61, 37), (5,)),
    "2:4, fewer inputs than n at the edge": ((2, 4), (9, 6), (7,)),
    "2:4, one row": ((2, 4), (148, 600), (1,)),
    "2:4, three rows": ((2, 4), (530, 70), (3,)),
    "4:8": ((4, 8), (64, 40), (2, 5)),
    "4:8, 1-D": ((4, 8), (60, 40), ()),
    "1:3": ((1, 3), (50, 33), (6,)),
    "5:12": ((5, 12), (50, 33), (17,)),
    "32:32, which is dense": ((32, 32), (40, 8), (8,)),
    "1:1, no rows": ((1, 1), (5, 3), (0,)),
    "one input, one output": ((1, 2), (1, 1), (3,)),
}


def make(n_m=(2, 4), shape=(8, 12), seed=0):
    return NMPattern.random(jax.random.key(seed), shape, n=n_m[0], m=n_m[1])


def densify(values, pattern) -> np.ndarray:
    """The oracle: W in float64, entry by entry."""
    if pattern.transposed:
        return densify(values, pattern.T).T
    values, bits = np.asarray(values, np.float64), np.asarray(pattern.bits)
    w = np.zeros((bits.shape[0] * pattern.m, bits.shape[1]))
    for (group, out), b in np.ndenumerate(bits):
        rows = [k for k in range(pattern.m) if int(b) >> k & 1]
        assert len(rows) == pattern.n
        for j, k in enumerate(rows):
            w[group * pattern.m + k, out] = values[group, j, out]
    return w[: pattern.shape[0]]


def gather(w, pattern) -> np.ndarray:
    """The stored entries of a dense matrix, in the order of the values."""
    if pattern.transposed:
        return gather(w.T, pattern.T)
    bits, values = np.asarray(pattern.bits), np.zeros(pattern.values_shape, w.dtype)
    w = np.pad(w, ((0, -len(w) % pattern.m), (0, 0)))
    for (group, column), b in np.ndenumerate(bits):
        rows = [k for k in range(pattern.m) if int(b) >> k & 1]
        values[group, :, column] = w[group * pattern.m + np.array(rows), column]
    return values


def products(xp, x, w, bias, dy, pattern, dtype):
    """y, dx, dW and db by the dense products of NumPy or JAX."""
    flat = [xp.asarray(a).astype(dtype) for a in (x.reshape(-1, x.shape[-1]), w, bias, dy.reshape(-1, dy.shape[-1]))]
    x2, w, bias, dy2 = flat
    of_w = x2.T @ dy2
    results = {"y": (x2 @ w + bias).reshape(dy.shape), "dx": (dy2 @ w.T).reshape(x.shape), "db": dy2.sum(0)}
    return {**results, "dW": gather(of_w, pattern) if xp is np else pattern.gather(of_w)}


def check(pattern, batch, dtype, backend):
    x, dy = testing.normal(0, (*batch, pattern.shape[0]), dtype), testing.normal(3, (*batch, pattern.shape[1]), dtype)
    values, bias = testing.normal(1, pattern.values_shape, dtype), testing.normal(2, (pattern.shape[1],), dtype)
    w = densify(values, pattern)
    f = lambda x, w, b: spmm(x, w, pattern, b, backend=backend)  # noqa: E731
    got = jax.jit(functools.partial(testing.value_and_gradients, f))(x, values, bias, dy)
    arrays = x, w, bias, dy, pattern
    truth, dense = products(np, *arrays, np.float64), products(jnp, *arrays, dtype)
    for name, true in truth.items():
        testing.assert_as_close_as_dense(got[name], true, dense[name], name)


# In the quick set each case has one dtype: every other one float32, the rest bfloat16 and float16 by turns.
QUICK = [jnp.float32, jnp.bfloat16, jnp.float32, jnp.float16]
SWEEP = [
    pytest.param(name, dtype, id=f"{name}-{dtype.__name__}", marks=[pytest.mark.slow] * (dtype != QUICK[k % 4]))
    for k, name in enumerate(CASES)
    for dtype in DTYPES
]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("name", "dtype"), SWEEP)
@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_the_product_and_its_gradients_match_the_dense_product(backend, name, dtype):
    n_m, shape, batch = CASES[name]
    check(make(n_m, shape), batch, dtype, backend)
    if dtype == jnp.float32:
        check(make(n_m, shape[::-1]).T, batch, dtype, backend)


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_the_products_in_float64(backend, x64):
    for name in ("2:4, ragged", "2:4, three rows"):
        n_m, shape, batch = CASES[name]
        check(make(n_m, shape), batch, jnp.float64, backend)


@pytest.mark.skipif(not BUILT, reason="the C++ kernels were not built")
@pytest.mark.parametrize("isa", mostly_slow(["portable", "avx2"]))
def test_other_instruction_sets_multiply_alike(isa):
    before = cpu_kernels.isa()
    try:
        cpu_kernels.use_isa(isa)
    except ValueError as lacking:
        pytest.skip(str(lacking))
    try:
        for name in ("2:4, several panels", "2:4, three rows", "5:12"):
            n_m, shape, batch = CASES[name]
            check(make(n_m, shape), batch, jnp.float32, None)
            check(make(n_m, shape[::-1]).T, batch, jnp.bfloat16, None)
    finally:
        cpu_kernels.use_isa(before)


@pytest.mark.parametrize("transformation", mostly_slow(TRANSFORMATIONS, 2))
@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_every_transformation_is_that_of_the_dense_product(backend, transformation):
    f, dense, operands = of_pattern(make())
    alone = {"export": "jacrev", "shard_map, checked": "grad"}.get(transformation, transformation)
    alone = "grad" if alone.startswith("jit on") else alone
    got = compiled(transformation, functools.partial(f, backend=backend), operands)
    if transformation == "eval_shape":
        want = np.zeros_like(dense(*operands))
    elif transformation == "export":
        scalar = lambda *a: jnp.sin(dense(*a)).sum()  # noqa: E731
        want = jax.value_and_grad(scalar, (0, 1, 2))(*operands)
    else:
        want = compiled(alone, dense, operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), list_of(got), list_of(want))


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_the_sampled_product_of_either_view_and_its_derivatives(backend):
    for pattern in (make(), make(shape=(12, 8)).T):
        x, dy = draw(1, 3, 8), draw(2, 3, 12)
        f = lambda x, dy, p=pattern: sddmm(x, dy, p, backend=backend)  # noqa: E731
        dense = lambda x, dy, p=pattern: p.gather(x.T @ dy)  # noqa: E731
        for transform in (jax.jit, jax.jacrev, jax.jacfwd):
            np.testing.assert_allclose(transform(f)(x, dy), transform(dense)(x, dy), rtol=1e-4, atol=1e-4)
        several = [jax.vmap(g, (0, None))(jnp.stack([x, -x]), dy) for g in (f, dense)]
        np.testing.assert_allclose(*several, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not BUILT, reason="the C++ kernels were not built")
def test_the_kernels_are_in_the_program_and_several_rows_are_one_call():
    pattern = make()
    loss = lambda x, w: spmm(x, w, pattern).sum()  # noqa: E731
    x, values = jnp.ones((3, 8)), jnp.ones(pattern.values_shape)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, values).as_text()
    assert "jaxsparse_cpu_n_m_spmm" in text and "n_m_sddmm" not in text
    text = jax.jit(jax.vmap(lambda x: spmm(x, values, pattern))).lower(x).as_text()
    assert text.count("custom_call @jaxsparse_cpu_n_m_spmm") == 1 and "while" not in text


# ---- the pattern ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(CASES, 3))
def test_a_pattern_and_its_values_round_trip(name):
    n_m, shape, _ = CASES[name]
    pattern = make(n_m, shape)
    w = testing.normal(0, shape, jnp.float32)
    values = pattern.gather(w)
    np.testing.assert_array_equal(values, gather(np.asarray(w), pattern))
    np.testing.assert_array_equal(pattern.to_dense(values), densify(values, pattern))
    np.testing.assert_array_equal(pattern.T.to_dense(values), densify(values, pattern).T)
    again = NMPattern.from_mask(pattern.to_mask(), n=pattern.n, m=pattern.m)
    np.testing.assert_array_equal(again.to_mask(), pattern.to_mask())
    entries, single = pattern.to_pattern(values)
    np.testing.assert_array_equal(entries.to_dense(single), densify(values, pattern))
    back, theirs = NMPattern.from_pattern(entries, single, n=pattern.n, m=pattern.m)
    np.testing.assert_array_equal(densify(theirs, back), densify(values, pattern))


def test_from_dense_keeps_the_largest_of_each_group_and_the_earlier_of_equal_ones():
    w = np.array([[3.0, 1], [-4, 1], [0, 1], [2, 1], [5, 0]])
    pattern = NMPattern.from_dense(w, n=2, m=4)
    np.testing.assert_array_equal(pattern.to_mask(), [[1, 1], [1, 1], [0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(pattern.gather(jnp.asarray(w))[:, :, 0], [[3, -4], [5, 0]])
    by_score = NMPattern.from_dense(w, n=2, m=4, score=-np.abs(w))
    np.testing.assert_array_equal(by_score.to_mask()[:4, 0], [0, 0, 1, 1])


def test_every_choice_is_equally_likely():
    counts = np.bincount(np.asarray(make((2, 4), (4096, 12)).bits).ravel(), minlength=16)
    kept = counts[[3, 5, 6, 9, 10, 12]]
    assert kept.sum() == 1024 * 12
    assert (
        (kept - 2048) ** 2 / 2048
    ).sum() < 20.5  # chi-square of 5 degrees of freedom: one run in a thousand is above


def test_patterns_are_traced_stacked_and_compiled_for_once():
    keys = jax.random.split(jax.random.key(0), 3)
    stack = jax.vmap(lambda key: NMPattern.random(key, (8, 12), n=2, m=4))(keys)
    assert stack.stacked == 1 and jax.eval_shape(make).values_shape == (2, 2, 12)
    x, values = jnp.ones((5, 8)), jnp.ones((3, 2, 2, 12))
    got = jax.jit(jax.vmap(lambda w, p: spmm(x, w, p)))(values, stack)
    one = [jax.tree.map(lambda a, k=k: a[k], stack) for k in range(3)]
    np.testing.assert_allclose(got, [x @ p.to_dense(values[0]) for p in one], rtol=1e-6)
    with pytest.raises(ValueError, match="carry 1 leading axes"):
        spmm(x, values[0], stack)
    traced = []
    f = jax.jit(lambda w, p: traced.append(1) or spmm(x, w, p))
    for p in one:
        f(values[0], p)
    assert len(traced) == 1


MASK = np.tile(np.array([[1], [1], [0], [0]]), (2, 3))
BITS = np.full((2, 3), 3, np.uint8)
SINGLE = BlockPattern.from_mask(np.ones((4, 1)))
REFUSED = {
    "too many of a mask": (lambda: NMPattern.from_mask(MASK, n=1, m=4), "inputs 0 to 3 of output 0 have 2 .*6 such"),
    "too few of a mask": (lambda: NMPattern.from_mask(MASK, n=3, m=4), "2 entries set, and 3 are needed of 3:4"),
    "n above m": (lambda: make((5, 4)), "n=5 of m=4: 1 <= n <= m <= 32"),
    "m above 32": (lambda: make((5, 33)), "m=33"),
    "no matrix": (lambda: NMPattern.from_dense(np.ones(3), n=2, m=4), r"shape \(3,\)"),
    "NaN": (lambda: NMPattern.from_dense(np.full((4, 2), np.nan), n=2, m=4), "8 NaN"),
    "another score": (lambda: NMPattern.from_dense(MASK, n=2, m=4, score=np.ones(3)), r"\(3,\), but the matrix is"),
    "full entries": (lambda: NMPattern.from_pattern(SINGLE, np.ones(4), n=2, m=4), "4 entries, more than 2:4 holds"),
    "blocks": (
        lambda: NMPattern.from_pattern(BlockPattern.block_diagonal(2, 2), None, n=2, m=4),
        r"blocks of \(2, 2\)",
    ),
    "values": (lambda: spmm(jnp.ones((3, 8)), jnp.ones((2, 3, 12)), make()), "values have shape .*2 of every 4 inputs"),
    "gather": (lambda: make().gather(jnp.ones((12, 8))), r"shape \(8, 12\), got \(12, 8\)"),
    "bits of another dtype": (
        lambda: NMPattern.from_bits(np.full((2, 3), 3), n=2, m=4, shape=(8, 3)),
        r"bits are int64 of shape \(2, 3\), but 2:4 of a \(8, 3\) matrix needs uint8 \(2, 3\)",
    ),
    "bits of another matrix": (lambda: NMPattern.from_bits(BITS, n=2, m=4, shape=(2, 12)), r"needs uint8 \(1, 12\)"),
    "bits of another n": (
        lambda: NMPattern.from_bits(BITS, n=1, m=4, shape=(8, 3)),
        r"bits\[0, 0\] is 11, of which 1",
    ),
    "a bit above m": (lambda: NMPattern.from_bits(BITS * 6, n=2, m=4, shape=(8, 3)), "is 10010, of which 2 of the 4"),
    "features": (lambda: spmm(jnp.ones((3, 9)), jnp.ones((2, 2, 12)), make()), "8 features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_raises_with_the_numbers(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_back_ends_without_these_products_say_so():
    x, values = jnp.ones((3, 8)), jnp.ones((2, 2, 12))
    with pytest.raises(NotImplementedError, match="'triton' can't run n_m_spmm here: it has no kernel for n_m_spmm"):
        spmm(x, values, make(), backend="triton")
    loss = lambda x, w: spmm(x, w, make(), backend="cpu").sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="'cpu' can't run n_m_sddmm here.*backend=None takes one that has"):
        jax.jit(jax.grad(loss, 1))(x, values)
    if BUILT:
        np.testing.assert_array_equal(jax.grad(loss)(x, values), jax.grad(lambda x: spmm(x, values, make()).sum())(x))


# ---- layers, and what goes with them --------------------------------------------------------------


LAYERS = {  # by framework: the layer of a pattern, its parameters and collections, and what applies them
    "Linen": lambda pattern: jaxsparse.SparseDense(pattern.shape[1], pattern=pattern),
    "NNX": lambda pattern: jaxsparse.SparseLinear(*pattern.shape, pattern=pattern, rngs=nnx.Rngs(0)),
}


def layer_of(kind, pattern):
    """(kernel, function of (kernel, x)) of a fresh layer."""
    layer, x = LAYERS[kind](pattern), jnp.ones((2, pattern.shape[0]))
    if kind == "Linen":
        variables = layer.init(jax.random.key(0), x)
        return variables["params"]["kernel"], lambda kernel, x: layer.apply(
            {**variables, "params": {**variables["params"], "kernel": kernel}}, x
        )
    graph, state = nnx.split(layer)

    def apply(kernel, x):
        return nnx.merge(graph, nnx.State({**state, "kernel": state["kernel"].replace(kernel)}))(x)

    return layer.kernel[...], apply


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_its_dense_matrix_and_starts_at_zero_beyond_the_edge(kind):
    pattern = make((2, 4), (9, 6))
    kernel, apply = layer_of(kind, pattern)
    x = testing.normal(0, (5, 9), jnp.float32)
    np.testing.assert_allclose(apply(kernel, x), x @ pattern.to_dense(kernel), rtol=1e-5, atol=1e-6)
    want = jax.grad(lambda w: jnp.square(x @ pattern.to_dense(w)).sum())(kernel)
    got = jax.grad(lambda w: jnp.square(apply(w, x)).sum())(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    inside = gather(np.ones(pattern.shape, bool), pattern)
    assert not np.asarray(kernel)[~inside].any() and np.asarray(kernel)[inside].all() and not inside.all()
    np.testing.assert_array_equal(pattern.edge_mask(), inside)
    assert make().edge_mask() is None


@pytest.mark.parametrize("kind", LAYERS)
def test_values_are_drawn_from_the_effective_fan_in(kind):
    kernel, _ = layer_of(kind, make((2, 4), (512, 64)))
    assert abs(float(jnp.std(kernel)) * 256**0.5 - 1) < 0.1


def test_a_full_layer_draws_what_a_dense_one_draws():
    pattern, x = make((4, 4), (8, 6)), jnp.ones((1, 8))
    sparse, dense = jaxsparse.SparseDense(6, pattern=pattern), linen.Dense(6)
    kernel = sparse.init(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_array_equal(pattern.to_dense(kernel), dense.init(jax.random.key(0), x)["params"]["kernel"])


def saved_and_loaded(how, tree, folder):
    """What comes back without a target."""
    if how == "checkpoint":
        checkpoint.save(folder / "c", tree)
        return checkpoint.load(folder / "c")
    if how == "msgpack":
        restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(tree))
    else:  # as Orbax has it: every leaf by the names in its path
        restored = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            *parents, last = [getattr(key, "key", getattr(key, "name", None)) for key in path]
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, restored)
            node[last] = np.asarray(leaf)
    return checkpoint.restore_patterns(restored)


@pytest.mark.parametrize("how", ["checkpoint", "msgpack", "leaves"])
def test_variables_with_a_pattern_come_back(how, tmp_path):
    layer = jaxsparse.SparseDense(6, pattern=make((5, 12), (6, 20)).T)
    with pytest.raises(ValueError, match="pattern is of a"):
        layer.init(jax.random.key(0), jnp.ones((2, 6)))
    layer = jaxsparse.SparseDense(6, pattern=make((5, 12), (6, 20)).T)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 20)))
    got = saved_and_loaded(how, variables, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, variables)
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    if how == "msgpack":
        other = jaxsparse.SparseDense(6, pattern=make((4, 12), (6, 20)).T).init(jax.random.key(0), jnp.ones((2, 20)))
        with pytest.raises(ValueError, match="the saved NMPattern.*5:12.* does not fit the model's"):
            flax.serialization.from_state_dict(other, flax.serialization.to_state_dict(variables))


def test_an_nnx_layer_takes_the_dict_of_its_pattern_and_refuses_that_of_another():
    layer = LAYERS["NNX"](make(seed=0))
    states = [{"bits_2of4_8x12": np.asarray(make(seed=k).bits)} for k in range(2)]
    layer.pattern.set_value(states[1])
    np.testing.assert_array_equal(layer.pattern.get_value().bits, states[1]["bits_2of4_8x12"])
    with pytest.raises(ValueError, match="does not fit the layer's"):
        layer.pattern.set_value({"bits_1of4_8x12": np.ones((2, 12), np.uint8)})


def test_a_layer_is_summed_up_pickled_and_made_dense():
    layer = LAYERS["NNX"](make())
    (row,) = jaxsparse.summary(layer)
    assert (row.shape, row.block, row.density, row.flops) == ((8, 12), (1, 1), 0.5, 2 * 48)
    assert row.bytes == 4 * (48 + 12) + 2 * 12
    np.testing.assert_array_equal(surgery.densify(layer).kernel[...], make().to_dense(layer.kernel[...]))
    again = pickle.loads(pickle.dumps(LAYERS["Linen"](make())))
    np.testing.assert_array_equal(again.pattern.bits, make().bits)
