"""torch.func's transforms and forward mode through JAX functions, Flax models and sparse layers."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen
from torch import func
from torch.autograd import forward_ad

from torch_bridge import BlockDiagLinear, BlockSparseLinear, BridgeError, from_flax, jax2torch

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports


def layer(x, w):
    return jnp.tanh(x @ w)


def torch_layer(x, w):
    return torch.tanh(x @ w)


X, W = torch.linspace(-1, 1, 20).reshape(5, 4), torch.linspace(-2, 1, 12).reshape(4, 3)
TRANSFORMS = {
    "vmap": lambda f: func.vmap(f, (0, None))(X, W),
    "vmap over the last axis": lambda f: func.vmap(f, (1, None), 1)(X.T, W),
    "grad": lambda f: func.grad(lambda w: f(X, w).sum())(W),
    "vjp": lambda f: func.vjp(lambda w: f(X, w), W)[1](torch.ones(5, 3))[0],
    "per-sample gradients": lambda f: func.vmap(func.grad(lambda w, x: f(x, w).sum()), (None, 0))(W, X),
    "jacrev": lambda f: func.jacrev(f, 1)(X, W),
    "jacfwd": lambda f: func.jacfwd(f, 1)(X, W),
    "jvp": lambda f: func.jvp(f, (X, W), (X + 1, W - 1))[1],
    "hessian": lambda f: func.hessian(lambda w: f(X, w).sum())(W),
    "grad of grad": lambda f: func.grad(lambda w: func.grad(lambda w: f(X, w).sum())(w).square().sum())(W),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_they_give_for_torchs_own_operators(name):
    torch.testing.assert_close(TRANSFORMS[name](jax2torch(layer)), TRANSFORMS[name](torch_layer), atol=1e-5, rtol=1e-4)


def test_structures_integers_and_constants_survive_transforms():
    def f(tree, *, scale):
        return {"y": tree["x"] * scale, "best": jnp.argmax(tree["x"])}

    out = func.vmap(lambda x: jax2torch(f)({"x": x}, scale=3))(X)
    assert torch.equal(out["y"], X * 3) and torch.equal(out["best"], X.argmax(1).int())
    grad, aux = func.grad(
        lambda x: (lambda o: (o["y"].sum(), o["best"]))(jax2torch(f)({"x": x}, scale=3)), has_aux=True
    )(X)
    assert torch.equal(grad, torch.full_like(X, 3.0)) and aux == X.argmax()


def test_forward_mode_works_outside_torch_func():
    with forward_ad.dual_level():
        y = jax2torch(layer)(forward_ad.make_dual(X, X + 1), W)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, func.jvp(lambda x: torch_layer(x, W), (X,), (X + 1,))[1])


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Dropout(0.5, deterministic=not train)(jnp.tanh(linen.Dense(6)(x)))
        return linen.Dense(2)(x)


def make_flax():
    return from_flax(Net(), jax.jit(Net().init)(jax.random.key(0), jnp.ones((2, 6)))).eval()


MODELS = {"block-diagonal": lambda: BlockDiagLinear(6, 4, 2), "flax": make_flax}
MODELS["block-sparse"] = lambda: BlockSparseLinear(6, 4, 0.5, 2)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_per_sample_gradients_of_models_are_those_of_single_samples(make):
    torch.manual_seed(0)
    model, samples = make(), torch.randn(3, 6)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, x):
        return func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    got = func.vmap(func.grad(loss), (None, 0))(parameters, samples)
    for i, x in enumerate(samples):
        want = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
        for ours, theirs in zip(got.values(), want, strict=True):
            torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=1e-4)


def test_forward_mode_goes_through_sparse_layers_in_jax():
    sparse, x = BlockDiagLinear(6, 4, 2, backend="xla"), torch.randn(2, 6)
    y, tangent = func.jvp(sparse, (x,), (x + 1,))
    torch.testing.assert_close((y, tangent), (sparse(x), (x + 1) @ func.jacrev(sparse)(x[0]).T), atol=1e-5, rtol=1e-4)


def test_dropout_under_vmap_asks_for_a_choice_as_torchs_does():
    torch.manual_seed(0)
    model, samples = make_flax().train(), torch.ones(8, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(model)(samples)
    different = func.vmap(model, randomness="different")(samples)
    same = func.vmap(model, randomness="same")(samples)
    assert not torch.equal(different[0], different[1]) and torch.equal(same[0], same[1])


def test_what_torch_or_jax_cannot_transform_is_refused_with_a_reason():
    reverse = jax.custom_vjp(lambda x: x)
    reverse.defvjp(lambda x: (x, None), lambda _, dy: (dy,))
    x, w = torch.ones(2, 6), W.clone().requires_grad_()
    with pytest.raises(TypeError) as error:
        func.jvp(jax2torch(reverse), (x,), (x,))
    assert any("Use reverse mode" in note for note in error.value.__notes__)
    with pytest.raises(BridgeError, match="torch.func.vmap and jacrev work"):
        torch.autograd.grad(jax2torch(layer)(X, w).sum(1), w, torch.eye(5), is_grads_batched=True)
