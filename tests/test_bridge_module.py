"""`from_flax`: Linen and NNX models as torch modules, trained by torch, and taken back."""

import copy
import functools
import io
import pickle

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx, traverse_util

import jaxsparse
from jaxsparse import nnx as sparse_nnx
from torch_bridge import BridgeError, from_flax
from torch_bridge.module import FlaxModule


class Plain(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(16)(x))
        return linen.Dense(4)(x)


class Full(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(16)(x))
        x = linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(4)(x)


class Sparse(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jaxsparse.BlockSparseDense(24, density=0.5, block=4)(x)
        return linen.Dense(4)(jnp.tanh(x))


class FullNNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), *[nnx.Linear(16, 16, rngs=rngs) for _ in range(10)]])
        self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.out = sparse_nnx.BlockSparseLinear(16, 4, density=0.5, block=4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.out(self.drop(self.norm(x)))


@functools.cache
def init(module, seed=0, features=8):
    return jax.jit(module.init)(jax.random.key(seed), jnp.ones((2, features)))


def wrap(kind) -> FlaxModule:
    torch.manual_seed(0)
    if issubclass(kind, nnx.Module):
        return from_flax(kind(nnx.Rngs(0)))
    return from_flax(kind(), init(kind()))


def torch_plain(module):
    p = dict(module.named_parameters())

    def dense(x, name):
        return x @ p[f"params.{name}.kernel"] + p[f"params.{name}.bias"]

    return lambda x: dense(torch.tanh(dense(x, "Dense_0")), "Dense_1")


KINDS = [Plain, Full, Sparse, FullNNX]


# ---- names, values, gradients ----------------------------------------------------------


def test_linen_state_dict_keys_are_the_flax_paths():
    assert set(wrap(Full).state_dict()) == set(traverse_util.flatten_dict(init(Full()), sep="."))
    assert {name for name, _ in wrap(Full).named_buffers()} == {
        "batch_stats.BatchNorm_0.mean",
        "batch_stats.BatchNorm_0.var",
    }


def test_nnx_parameters_and_buffers_are_the_nnx_paths():
    module = wrap(FullNNX)
    assert {"layers.0.kernel", "layers.10.bias", "norm.scale", "out.kernel"} < {n for n, _ in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()}
    assert {"norm.mean", "norm.var"} < buffers
    assert sum(name.startswith("out.pattern.") for name in buffers) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_those_of_flax_and_so_do_taken_back_variables(kind):
    module, x = wrap(kind).eval(), np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    if kind is FullNNX:
        model = FullNNX(nnx.Rngs(1))
        nnx.update(model, module.variables())
        model.eval()
        want = model(x)
    else:
        want = jax.jit(kind().apply)(init(kind()), x)
        jax.tree.map(np.testing.assert_array_equal, module.variables(), init(kind()))
    np.testing.assert_allclose(module(torch.tensor(x)).detach().numpy(), want, atol=1e-6)


LAYERS = [
    jaxsparse.BlockDiagDense(16, num_blocks=4),
    jaxsparse.BlockSparseDense(24, density=0.5, block=4),
    jaxsparse.SparseDense(4, density=0.5),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_gradients_equal_those_of_flax_bit_for_bit(layer):
    variables, x = init(layer), np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    module = from_flax(layer, variables)
    module(torch.tensor(x)).square().sum().backward()

    def loss(params, x):
        return jnp.square(layer.apply({**variables, "params": params}, x)).sum()

    want = jax.jit(jax.grad(loss))(variables["params"], x)
    for name, p in module.get_submodule("params").named_parameters():
        np.testing.assert_array_equal(p.grad.numpy(), want[name])


def test_patterns_are_integer_buffers_that_training_leaves_alone():
    module = wrap(Sparse)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    assert len(buffers) == 5 and all(b.dtype == torch.int32 for b in buffers.values())
    step = torch.optim.Adam(module.parameters())
    module(torch.randn(6, 8)).square().sum().backward()
    step.step()
    for name, b in module.named_buffers():
        assert torch.equal(b, buffers[name])
        assert b._version == 0


# ---- memory ----------------------------------------------------------


@pytest.mark.parametrize("kind", [Full, FullNNX])
def test_training_never_changes_the_callers_arrays(kind):
    if kind is Full:
        given = init(Full())
        module = from_flax(Full(), given)
    else:
        model = FullNNX(nnx.Rngs(0))
        given, module = nnx.state(model), from_flax(model)
    before, back = jax.tree.map(lambda a: np.array(a, copy=True), _raw(given)), module.variables()
    back_before = jax.tree.map(lambda a: np.array(a, copy=True), _raw(back))
    step = torch.optim.SGD(module.parameters(), 1.0)
    for _ in range(2):
        module(torch.randn(6, 8)).square().mean().backward()
        step.step()
    jax.tree.map(np.testing.assert_array_equal, before, _raw(given))
    jax.tree.map(np.testing.assert_array_equal, back_before, _raw(back))


def _raw(tree):
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves]


def test_an_update_between_forward_and_backward_raises_as_in_torch():
    module = wrap(Plain)
    y = module(torch.randn(3, 8)).sum()
    with torch.no_grad():
        next(module.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_model_follows_every_way_of_loading_weights():
    module, x = wrap(Plain), torch.randn(3, 8)

    def follows():
        return torch.allclose(module(x), torch_plain(module)(x), atol=1e-5)

    assert follows()
    for assign in (False, True):
        module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()}, assign=assign)
        assert follows()
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach() * 0.5
    torch.nn.utils.vector_to_parameters(flat, module.parameters())  # views, most of them misaligned
    assert follows()
    flat.mul_(2.0)
    assert follows()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_training_equals_the_same_model_in_torch(name):
    module, rate = wrap(Plain), 0.05
    twin = copy.deepcopy(module)
    runs = [(module, module), (twin, torch_plain(twin))]
    steps = [getattr(torch.optim, name)(owner.parameters(), rate) for owner, _ in runs]
    for _ in range(5):
        x = torch.randn(6, 8)
        for step, (_, call) in zip(steps, runs, strict=True):
            step.zero_grad()
            call(x).square().mean().backward()
            step.step()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_frozen_parameters_get_no_gradient_and_cost_none():
    module = wrap(Plain)
    for name, p in module.named_parameters():
        p.requires_grad_(name == "params.Dense_1.bias")
    module(torch.randn(3, 8)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["params.Dense_1.bias"]
    (plan,) = module._model._plans.values()
    assert [sum(mask) for mask in plan.op._forward] == [1]


# ---- modes, statistics, randomness ----------------------------------------------------------


@pytest.mark.parametrize("kind", [Full, FullNNX])
def test_dropout_follows_torchs_seed_and_eval_leaves_the_generator_alone(kind):
    module, x = wrap(kind), torch.randn(6, 8)
    twin = copy.deepcopy(module)
    torch.manual_seed(1)
    first, other = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), first) and not torch.equal(first, other)
    state = torch.get_rng_state()
    module.eval()
    assert torch.equal(module(x), module(x)) and torch.equal(state, torch.get_rng_state())


def test_a_model_without_dropout_leaves_the_generator_alone():
    module, x = wrap(Plain), torch.randn(6, 8)
    state = torch.get_rng_state()
    module(x)
    assert torch.equal(state, torch.get_rng_state())


def test_batch_statistics_are_updated_in_place_as_flax_updates_them():
    module, x = wrap(Full), torch.randn(64, 8)
    mean = module.get_buffer("batch_stats.BatchNorm_0.mean")
    y = module(x)
    rngs = {"dropout": jax.random.key(0)}
    _, new = Full().apply(init(Full()), x.numpy(), train=True, mutable=["batch_stats"], rngs=rngs)
    np.testing.assert_allclose(mean, new["batch_stats"]["BatchNorm_0"]["mean"], atol=1e-6)
    y.sum().backward()  # the statistics changed since the forward pass, and that is fine
    before = mean.clone()
    module.eval()(x)
    assert torch.equal(mean, before)


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        return jnp.tanh(linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x)))


def test_second_derivatives_go_through_batch_statistics():
    module, x = wrap(Normed), torch.randn(6, 8, requires_grad=True)
    (g,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    g.square().sum().backward()

    def total(x):
        return Normed().apply(init(Normed()), x, train=True, mutable=["batch_stats"])[0].sum()

    want = jax.grad(lambda x: jnp.square(jax.grad(total)(x)).sum())(x.detach().numpy())
    assert abs(want).max() > 0.01
    np.testing.assert_allclose(x.grad, want, rtol=1e-4, atol=1e-5 * abs(want).max())


# ---- copies, checkpoints, other uses ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_checkpoints_compute_the_same_and_share_nothing(kind):
    module, x = wrap(kind).eval(), torch.randn(3, 8)
    y = module(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = from_flax(kind(nnx.Rngs(5))) if kind is FullNNX else from_flax(kind(), init(kind(), 9))
    fresh.eval().load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            [p.zero_() for p in other.parameters()]
        assert torch.equal(module(x), y) and not torch.equal(other(x), y)


def test_load_variables_works_in_place_and_refuses_what_does_not_fit():
    module, x = wrap(Full).eval(), torch.randn(3, 8)
    other = init(Full(), 5)
    places = [p.data_ptr() for p in module.parameters()]
    module.load_variables(other)
    np.testing.assert_allclose(module(x).detach(), Full().apply(other, x.numpy()), atol=1e-6)
    assert places == [p.data_ptr() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"lack \['batch_stats.BatchNorm_0.mean'"):
        module.load_variables({"params": other["params"]})
    wide = init(Full(), 5, 9)
    with pytest.raises(ValueError, match=r"Dense_0.kernel is torch.float32\[8, 16\] here.*\[9, 16\]"):
        module.load_variables(wide)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX's own word on what we refuse
def test_checkpoints_may_hold_numpy_arrays_but_are_not_narrowed():
    restored, x = jax.tree.map(np.array, init(Plain())), torch.randn(3, 8)
    assert torch.equal(from_flax(Plain(), restored)(x), wrap(Plain)(x))
    wide = jax.tree.map(lambda a: a.astype(np.float64), restored)
    with pytest.raises(BridgeError, match="params.Dense_0.bias is float64, which JAX would narrow to float32"):
        wrap(Plain).load_variables(wide)


def test_a_pattern_of_another_shape_is_refused():
    saved, other = LAYERS[1], jaxsparse.BlockSparseDense(24, density=0.5, block=(8, 2))  # as many values
    with pytest.raises(RuntimeError, match="Missing key.*8x24_by_8x2"):
        from_flax(other, init(other)).load_state_dict(from_flax(saved, init(saved)).state_dict())


def test_repeated_calls_trace_once():
    module = wrap(Full)
    for _ in range(4):
        module(torch.randn(3, 8)).sum().backward()
    (plan,) = module._model._plans.values()
    assert plan.op.traces == 1
