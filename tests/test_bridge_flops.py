"""torch's FlopCounterMode on what computes in JAX: two for a multiply-add of a stored weight, as torch does."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import jaxsparse
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, from_flax, jax2torch

ROWS = 21
LAYERS = {
    "dense": (lambda: nn.Linear(64, 96), 64 * 96),
    "entries": (lambda: SparseLinear(64, 96, 0.1), 614),
    "blocks": (lambda: BlockSparseLinear(64, 96, 0.25, (8, 16)), 12 * 8 * 16),
    "blocks that overlap the edge": (lambda: BlockSparseLinear(60, 90, 0.25, (8, 16)), 12 * 8 * 16),
    "diagonal blocks": (lambda: BlockDiagLinear(64, 96, 4), 64 * 96 // 4),
}


def work(function, *args):
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("wants_dx", [False, True])
@pytest.mark.parametrize("make, stored", LAYERS.values(), ids=LAYERS)
def test_a_layer_counts_its_stored_weights_in_each_product(make, stored, wants_dx):
    layer = make()
    assert layer.weight.numel() == stored
    x = torch.randn(3, 7, layer.in_features, requires_grad=wants_dx)
    forward, y = work(layer, x)
    backward, _ = work(y.sum().backward)
    assert (forward, backward) == (2 * ROWS * stored, (1 + wants_dx) * 2 * ROWS * stored)
    both, _ = work(lambda: layer(x).sum().backward())
    assert both == forward + backward


def test_a_layer_without_gradients_and_a_mapped_one_count_the_same():
    layer, x = SparseLinear(64, 96, 0.1), torch.randn(3, 7, 64)
    with torch.no_grad():
        assert work(layer, x)[0] == 2 * ROWS * 614
    assert work(torch.func.vmap(layer), x)[0] == 2 * ROWS * 614
    frozen = SparseLinear(64, 96, 0.1).requires_grad_(False)
    assert work(lambda: frozen(x.requires_grad_()).sum().backward())[0] == 4 * ROWS * 614


class Net(linen.Module):
    """A dense layer, and a stack of three sparse ones."""

    @linen.compact
    def __call__(self, x):
        stack = linen.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0, "pattern": 0},
            split_rngs={"params": True},
            length=3,
        )
        x = linen.Dense(32)(jnp.tanh(x))
        return stack(jaxsparse.SparseDense(32, 0.25), x, None)[0]


def test_a_flax_model_counts_its_layers_without_what_a_graph_would_compute_anew():
    model = from_flax(Net(), Net().init(jax.random.key(0), jnp.ones((1, 64))))
    dense, sparse = 2 * ROWS * 64 * 32, 3 * 2 * ROWS * 256
    forward, y = work(model, torch.randn(ROWS, 64))
    assert forward == dense + sparse
    assert work(y.sum().backward)[0] == dense + 2 * sparse


def test_a_function_counts_its_products_as_torch_does():
    w = torch.randn(64, 5, requires_grad=True)
    ours, theirs = jax2torch(lambda x, w: jnp.tanh(x @ w) @ w.T), lambda x, w: torch.tanh(x @ w) @ w.T
    x = torch.randn(3, 64, requires_grad=True)
    counts = [work(lambda f=f: f(x, w).sum().backward())[0] for f in (ours, theirs)]
    assert counts[0] == counts[1] == 6 * 2 * 3 * 64 * 5
    batched = jax2torch(jax.vmap(jnp.matmul))
    assert work(batched, torch.ones(3, 7, 64), torch.ones(3, 64, 2))[0] == 2 * ROWS * 64 * 2


def test_a_convolution_counts_as_torchs_does():
    conv = from_flax(linen.Conv(6, (3, 3), padding="VALID", feature_group_count=2), CONVOLUTION)
    theirs = nn.Conv2d(4, 6, 3, groups=2)
    x = torch.randn(2, 8, 8, 4)
    assert work(conv, x)[0] == work(theirs, x.permute(0, 3, 1, 2))[0] > 0


CONVOLUTION = {"params": {"kernel": jnp.ones((3, 3, 2, 6)), "bias": jnp.zeros(6)}}


def test_branches_count_as_the_dearest():
    @jax2torch
    def f(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert work(f, torch.ones(4, 4))[0] == 2 * 2 * 4**3


def test_tensors_on_the_meta_device_are_counted_and_not_computed_with():
    f, x = jax2torch(jnp.matmul), torch.empty(ROWS, 64, device="meta")
    w = torch.empty(64, 5, device="meta", requires_grad=True)
    forward, y = work(f, x, w)
    assert y.is_meta and y.shape == (ROWS, 5)
    assert forward == work(y.sum().backward)[0] == 2 * ROWS * 64 * 5
