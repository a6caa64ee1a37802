"""Flax models with sparse layers put in by rules: NNX by replacement, Linen by interception."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsparse import BlockPattern, BlockSparseLinear, SparseDense, SparseLinear
from jaxsparse import nnx as sparse_nnx
from jaxsparse.costs import racing
from jaxsparse.costs.racing import Race
from jaxsparse.surgery import keep_faster, sparsify, sparsify_linen, sparsify_variables

DIAGONAL = {"kind": "block_diag", "num_blocks": 4}
BLOCKS = {"kind": "block_sparse", "density": 0.5, "block": 8}
ENTRIES = {"kind": "sparse", "density": 0.2}
RULES = [("up", DIAGONAL), (r"body\.0", None), (r"body\..*", BLOCKS), ("head", ENTRIES)]
X = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, **options):
        options = {"rngs": nnx.Rngs(0), **options}
        self.up = nnx.Linear(16, 32, **options)
        self.body = nnx.List([nnx.Linear(32, 32, **options) for _ in range(2)])
        self.norm = nnx.LayerNorm(32, rngs=options["rngs"])
        self.head = nnx.Linear(32, 5, **options, use_bias=False)

    def __call__(self, x):
        x = nnx.relu(self.up(x))
        for layer in self.body:
            x = nnx.relu(layer(x))
        return self.head(self.norm(x))


def dense_kernel(layer):
    """The (in, out) matrix of a sparse layer, by the formula of its pattern."""
    kernel = np.asarray(layer.kernel[...], np.float32)
    if isinstance(layer, sparse_nnx.BlockDiagLinear):
        return np.asarray(jax.scipy.linalg.block_diag(*kernel))
    return np.asarray(layer.pattern.get_value().to_dense(jnp.asarray(kernel)))


# ---- NNX ----------------------------------------------------------------------------------------------


def test_a_new_model_computes_with_what_each_layer_kept():
    model = Net()
    before = jax.tree.map(np.array, nnx.state(model))
    new, report = sparsify(model, RULES)
    kinds = [type(m) for m in (new.up, *new.body, new.norm, new.head)]
    assert kinds == [sparse_nnx.BlockDiagLinear, nnx.Linear, BlockSparseLinear, nnx.LayerNorm, SparseLinear]
    assert {row.path: row.kind for row in report} == {
        "up": "block_diag",
        "body.1": "block_sparse",
        "head": "sparse",
    }
    masked = nnx.clone(model)
    for row, layer in zip(report, (new.body[1], new.head, new.up), strict=True):
        old = {"up": masked.up, "body.1": masked.body[1], "head": masked.head}[row.path]
        kept, w = dense_kernel(layer), np.asarray(old.kernel[...])
        np.testing.assert_array_equal(kept[kept != 0], w[kept != 0])
        assert row.relative_error == pytest.approx(np.linalg.norm(kept - w) / np.linalg.norm(w))
        old.kernel[...] = kept
    np.testing.assert_allclose(new(X), masked(X), rtol=1e-4, atol=1e-5)
    count = lambda m: sum(p.size for p in jax.tree.leaves(nnx.state(m, nnx.Param)))  # noqa: E731
    assert report.parameters == (count(model), count(new))
    new.body[0].kernel[...] = jnp.zeros((32, 32))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(model)))


def test_a_dry_run_returns_the_model_and_the_same_report():
    model = Net()
    same, report = sparsify(model, RULES, rngs=nnx.Rngs(0), dry_run=True)
    assert same is model and list(report) == list(sparsify(model, RULES)[1])


def test_full_layers_keep_everything_in_any_dtype():
    model = Net(param_dtype=jnp.bfloat16)
    rules = [("up", {"kind": "block_diag", "num_blocks": 1}), ("head", {"kind": "sparse", "density": 1})]
    new, report = sparsify(model, [*rules, (".*", {"kind": "block_sparse", "density": 1, "block": (5, 7)})])
    assert [row.relative_error for row in report] == [0] * 4
    assert new.head.kernel[...].dtype == new.body[0].kernel[...].dtype == jnp.bfloat16
    assert all((dense_kernel(new.body[i]) == np.asarray(model.body[i].kernel[...], np.float32)).all() for i in (0, 1))


def test_rescaled_layers_keep_their_norm_and_the_top_blocks():
    model = Net()
    new, _ = sparsify(model, RULES, rescale=True)
    old, kept = np.asarray(model.body[1].kernel[...]), dense_kernel(new.body[1])
    assert np.linalg.norm(kept) == pytest.approx(np.linalg.norm(old))
    assert new.body[1].pattern.get_value().to_mask().tolist() == (
        BlockPattern.from_dense(old, density=0.5, block=8).to_mask().tolist()
    )


def pruned(block=1):
    """The model with nine tenths of the blocks of two kernels set to zero."""
    model, rng = Net(), np.random.default_rng(1)
    for layer in (model.body[0], model.head):
        w = np.asarray(layer.kernel[...])
        grid = [-(-size // block) for size in w.shape]
        mask = np.kron(rng.random(grid) < 0.1, np.ones((block, block)))[: w.shape[0], : w.shape[1]]
        layer.kernel[...] = jnp.asarray(w * mask)
    return model


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{"kind": "sparse"}, {"kind": "block_sparse", "block": 4}], ids=lambda o: o["kind"])
def test_what_is_not_zero_is_kept_bit_for_bit(options, dtype):
    model = pruned(block=4)
    for layer in (model.up, *model.body, model.head):
        layer.kernel[...] = layer.kernel[...].astype(dtype)
    new, report = sparsify(model, [(".*", {**options, "keep": "nonzero"})])
    assert [(row.path, row.relative_error) for row in report] == [("body.0", 0), ("head", 0)]
    for old, layer in ((model.body[0], new.body[0]), (model.head, new.head)):
        w = np.asarray(old.kernel[...].astype(jnp.float32))
        np.testing.assert_array_equal(dense_kernel(layer), w)
        if options["kind"] == "sparse":
            assert layer.kernel[...].size == np.count_nonzero(w)
    assert {one.path: one.reason.split(":")[0] for one in report.left}.keys() == {"up", "body.1"}
    assert all("has no zeros" in one.reason for one in report.left) and type(new.up) is nnx.Linear
    assert f"{report[0].after.split()[1].rstrip(',')}" == f"{new.body[0].pattern.get_value().density:.4g}"


def test_fresh_layers_have_nothing_to_keep():
    with pytest.raises(ValueError, match="fresh layers draw it: give a density"):
        sparsify(Net(), [(".*", {"kind": "sparse", "keep": "nonzero"})], rngs=nnx.Rngs(0), fresh=True)


def test_fresh_layers_are_drawn_from_the_rngs():
    rules = [("head", ENTRIES)]
    heads = [sparsify(Net(), rules, fresh=True, rngs=nnx.Rngs(seed))[0].head.kernel[...] for seed in (1, 1, 2)]
    assert (heads[0] == heads[1]).all() and not (heads[0] == heads[2]).any()
    with pytest.raises(ValueError, match="give rngs"):
        sparsify(Net(), RULES, fresh=True)
    one, two = (sparsify(Net(), RULES, fresh=True, rngs=nnx.Rngs(seed))[0] for seed in (1, 2))
    nnx.update(two, nnx.state(one, nnx.Param))  # parameters alone: the patterns are the same
    assert (two(X) == one(X)).all()


def test_a_density_that_keeps_nothing_of_a_layer_is_refused_by_its_path():
    with pytest.raises(ValueError, match=r"head: density=0.0001 keeps nothing of a \(\d+, \d+\) \(in, out\) matrix"):
        sparsify(Net(), [("head", {"kind": "sparse", "density": 1e-4})])


def test_a_layer_in_two_places_stays_one_and_a_shared_kernel_is_refused():
    model = Net()
    model.again = model.head
    new, report = sparsify(model, [("again", ENTRIES)])
    assert new.again is new.head and isinstance(new.head, SparseLinear) and len(report) == 1
    model = Net()
    model.body[1].kernel = model.body[0].kernel
    with pytest.raises(ValueError, match=r"body\.1 shares its kernel"):
        sparsify(model, RULES)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="head: out=5 is not a whole number"):
        sparsify(Net(), [("head", DIAGONAL)])
    with pytest.raises(ValueError, match="'norm', a LayerNorm"):
        sparsify(Net(), [("norm", ENTRIES)])
    with pytest.raises(ValueError, match="body.1: it has a dot_general of its own"):
        sparsify(Net(dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), RULES)
    stacked = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"kernel has shape \(3, 4, 4\)"):
        sparsify(nnx.Sequential(stacked), [(r"layers\.0", ENTRIES)])


def test_only_what_is_faster_is_replaced(monkeypatch):
    rounds = iter([Race((1.0, 2.0), 0, 9), Race((2.0, 1.0), 9, 9), Race((1.0, 1.0), 5, 9)])
    monkeypatch.setattr(racing, "race", lambda steps: [step() for step in steps] and next(rounds))
    new, report = sparsify(Net(), RULES, only_if_faster=True, batch=8)
    assert [(row.path, row.kind) for row in report] == [("body.1", "dense"), ("head", "sparse"), ("up", "dense")]
    assert [row.milliseconds for row in report] == [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    assert type(new.up) is nnx.Linear and type(new.head) is SparseLinear
    assert [report[0].after, report[2].after] == ["dense, which is faster", "dense, as a race can't tell"]


# ---- Linen --------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One Dense called twice, one under remat, one scanned, and dropout."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        dense = nn.Dense(16, name="twice")
        x = nn.relu(dense(dense(x)))
        x = nn.remat(nn.Dense)(32, name="up")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5, name="head", use_bias=False)(nn.LayerNorm()(x))


LINEN_RULES = [("twice", DIAGONAL), ("up", BLOCKS), ("head", ENTRIES)]


def test_init_makes_the_sparse_variables_under_the_dense_paths():
    model = sparsify_linen(Twice(), LINEN_RULES)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "twice": {"kernel": (4, 4, 4), "bias": (16,)},
        "up": {"kernel": (4, 8, 8), "bias": (32,)},
        "LayerNorm_0": {"scale": (32,), "bias": (32,)},
        "head": {"kernel": (32,)},
    }
    assert set(variables["pattern"]) == {"up", "head"} and hash(model)
    assert shapes.keys() == jax.eval_shape(Twice().init, jax.random.key(0), X)["params"].keys()
    grad = jax.grad(lambda params, variables: model.apply({**variables, "params": params}, X).sum())
    assert jax.tree.map(jnp.shape, jax.eval_shape(grad, variables["params"], variables)) == shapes


def test_what_stays_dense_starts_as_in_the_dense_model():
    dense = nn.Sequential([nn.Dense(4), nn.Dense(4)])
    model = sparsify_linen(dense, [("layers_0", DIAGONAL)])
    same, want = (m.init(jax.random.key(0), X)["params"]["layers_1"] for m in (model, dense))
    np.testing.assert_array_equal(same["kernel"], want["kernel"])


def test_converted_variables_compute_what_was_kept():
    dense, model = Twice(), sparsify_linen(Twice(), LINEN_RULES)
    variables = dense.init(jax.random.key(0), X)
    sparse, report = sparsify_variables(model, variables, X, train=False)
    params, masked = sparse["params"], jax.tree.map(lambda a: a, variables["params"])
    masked["twice"]["kernel"] = jax.scipy.linalg.block_diag(*params["twice"]["kernel"])
    for name in ("up", "head"):
        masked[name]["kernel"] = sparse["pattern"][name]["pattern"].to_dense(params[name]["kernel"])
    options = {"train": True, "rngs": {"dropout": jax.random.key(1)}}
    want = dense.apply({"params": masked}, X, **options)
    np.testing.assert_allclose(model.apply(sparse, X, **options), want, rtol=1e-4, atol=1e-5)
    for row in report:
        new, old = (np.asarray(tree[row.path]["kernel"]) for tree in (masked, variables["params"]))
        assert row.relative_error == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old))
    sizes = [sum(p.size for p in jax.tree.leaves(tree)) for tree in (variables["params"], params)]
    assert report.parameters == tuple(sizes)


def test_linen_variables_that_were_pruned_keep_what_is_not_zero():
    module = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(5)])
    variables = module.init(jax.random.key(0), X)
    kernel = variables["params"]["layers_0"]["kernel"]
    keep = np.random.default_rng(0).random(kernel.shape) < 0.2
    variables["params"]["layers_0"]["kernel"] = kernel * keep
    model = sparsify_linen(module, [("layers_0", {"kind": "sparse", "keep": "nonzero"})])
    new, report = sparsify_variables(model, variables, X)
    assert new["params"]["layers_0"]["kernel"].shape == (keep.sum(),) and report[0].relative_error == 0
    assert report[0].after == f"sparse, {keep.mean():.4g}"
    np.testing.assert_allclose(model.apply(new, X), module.apply(variables, X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="layers_0: init has no weights .* sparsify_variables"):
        model.init(jax.random.key(0), X)


def test_a_model_with_sparse_parts_may_be_part_of_another():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(sparsify_linen(Twice(), LINEN_RULES)(x))

    variables = jax.eval_shape(Outer().init, jax.random.key(0), X)
    assert jnp.shape(variables["params"]["SparsifiedLinen_0"]["head"]["kernel"]) == (32,)
    assert jnp.shape(variables["params"]["Dense_0"]["kernel"]) == (5, 3)


def test_layers_under_a_scan_get_a_pattern_each():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "pattern": 0}
            scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(16, name="dense")(x), None

    model = sparsify_linen(Stack(), [(r"layers\.dense", BLOCKS)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    assert variables["params"]["layers"]["dense"]["kernel"].shape == (3, 2, 8, 8)
    assert model.apply(variables, X).shape == (3, 16)
    with pytest.raises(ValueError, match=r"layers\.dense: its kernel has shape \(3, 16, 16\)"):
        sparsify_variables(model, Stack().init(jax.random.key(0), X), X)


def test_a_single_dense_and_one_beside_a_sparse_layer_are_converted():
    model, dense = sparsify_linen(nn.Dense(4), [("", ENTRIES)]), nn.Dense(4)
    sparse, report = sparsify_variables(model, dense.init(jax.random.key(0), X), X)
    assert model.apply(sparse, X).shape == (3, 4) and report[0].path == ""
    mixed = nn.Sequential([SparseDense(8, density=0.5), nn.Dense(4)])
    model = sparsify_linen(mixed, [("layers_1", ENTRIES)])
    sparse, _ = sparsify_variables(model, mixed.init(jax.random.key(0), X), X)
    assert sparse["pattern"].keys() == {"layers_0", "layers_1"} and model.apply(sparse, X).shape == (3, 4)


def test_linen_rules_that_match_nothing_and_odd_layers_are_told_apart():
    with pytest.raises(ValueError, match="'heat', matches no layer.*'head'"):
        sparsify_linen(Twice(), [("heat", ENTRIES)]).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="'LayerNorm_0', a LayerNorm"):
        sparsify_variables(sparsify_linen(Twice(), [("Layer.*", ENTRIES)]), {"params": {}}, X)
    with pytest.raises(ValueError, match="head: features=5 is not a whole number"):
        sparsify_linen(Twice(), [("head", DIAGONAL)]).init(jax.random.key(0), X)
    odd = nn.Dense(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k))
    with pytest.raises(ValueError, match=r"layers_0: it has a dot_general"):
        sparsify_linen(nn.Sequential([odd]), [("layers_0", ENTRIES)]).init(jax.random.key(0), X)


# ---- what is left ----------------------------------------------------------------------------------------


class Scaled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_nnx_layers_that_look_dense_are_left_with_a_reason():
    model = Net()
    model.scaled, model.general = Scaled(4, 4, rngs=nnx.Rngs(0)), nnx.LinearGeneral(4, 4, rngs=nnx.Rngs(0))
    new, report = sparsify(model, [(".*", ENTRIES)])
    assert type(new.scaled) is Scaled and type(new.general) is nnx.LinearGeneral
    reasons = {one.path: one.reason for one in report.left}
    assert reasons.keys() == {"scaled", "general"}
    assert "is a Scaled, a subclass of nnx.Linear, which may compute" in reasons["scaled"]
    assert "is a LinearGeneral, and no nnx.Linear." in reasons["general"] and reasons["general"] in str(report)
    with pytest.raises(ValueError, match="'scaled' is a Scaled, a subclass"):
        sparsify(model, [("scaled", ENTRIES)])


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.DenseGeneral(4)(x))


def test_linen_layers_that_look_dense_are_left_with_a_reason():
    variables = Odd().init(jax.random.key(0), X)
    _, report = sparsify_variables(sparsify_linen(Odd(), [(".*", ENTRIES)]), variables, X)
    assert [(one.path, one.reason.split(".")[0]) for one in report.left] == [
        ("DenseGeneral_0", "is a DenseGeneral, and no nn")
    ]
    with pytest.raises(ValueError, match="'DenseGeneral_0' is a DenseGeneral, and no nn.Dense"):
        sparsify_linen(Odd(), [("DenseGeneral.*", ENTRIES)]).init(jax.random.key(0), X)


def test_linen_layers_that_are_not_faster_stay_dense(monkeypatch):
    verdicts = iter([Race((1.0, 2.0), 0, 9), Race((2.0, 1.0), 9, 9)])
    raced = []
    monkeypatch.setattr(racing, "race", lambda steps: [raced.append(step()) for step in steps] and next(verdicts))
    dense, x = (
        nn.Sequential([nn.Dense(16, dtype=jnp.bfloat16), nn.Dense(24), nn.Dense(24, name="last")]),
        jnp.ones((2, 8)),
    )
    variables = dense.init(jax.random.key(0), x)
    rules = [("layers_0", ENTRIES), ("layers_1", DIAGONAL), (".*", None)]
    model, races = keep_faster(sparsify_linen(dense, rules), variables, 4, x)
    assert {path: race.faster for path, race in races.items()} == {"layers_0": False, "layers_1": True}
    assert raced[0][1].shape == (4, 8) and raced[0][1].dtype == jnp.bfloat16  # gradients of the input, in its dtype
    assert [(rule.pattern, rule.kind) for rule in model.rules] == [
        ("layers_0", None),
        ("layers_1", "block_diag"),
        (".*", None),
    ]
    new, report = sparsify_variables(model, variables, x)
    assert [row.path for row in report] == ["layers_1"] and model.apply(new, x).shape == (2, 24)
    assert jax.tree.map(jnp.shape, new["params"]["layers_0"]) == jax.tree.map(
        jnp.shape, variables["params"]["layers_0"]
    )
