"""Patterns of torch layers that move: the decisions of jaxsparse.dynamic, with all that torch keeps beside a weight."""

import copy
import functools

import pytest
from sweeps import mostly_slow

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from jaxsparse.formats import BlockPattern
from jaxsparse.training import dynamic as jax_dynamic
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, dynamic, torch_to_jax

PATTERN = BlockPattern.random(jax.random.key(3), (24, 18), density=0.4, block=(3, 4))
LAYERS = {
    "entries": lambda **kw: SparseLinear(24, 18, 0.3, **kw),
    "blocks": lambda **kw: BlockSparseLinear(24, 18, 0.4, (5, 4), **kw),
    "transposed": lambda **kw: BlockSparseLinear(18, 24, pattern=PATTERN.T, **kw),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "AdamW, fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=0.01),
}


def trained(make, optimizer, dtype=torch.float32):
    """A layer after three steps, its optimizer, and the x and dy of the last one."""
    torch.manual_seed(0)
    layer = make(dtype=dtype)
    optimizer = optimizer(layer.parameters())
    for _ in range(3):
        x = torch.randn(7, layer.in_features).to(dtype)
        y = layer(x)
        y.retain_grad()
        optimizer.zero_grad()
        (y.float() - 1).square().mean().backward()
        optimizer.step()
    return layer, optimizer, x, y.grad


def everything(layer, optimizer):
    """All that has a number for each entry: weight, gradient, state."""
    state = [t for t in optimizer.state[layer.weight].values() if isinstance(t, torch.Tensor) and t.ndim]
    return [layer.weight.detach(), layer.weight.grad, *state]


def places(layer):
    return np.stack([np.asarray(layer.pattern.rows), np.asarray(layer.pattern.cols)], 1)


@each_layer
@pytest.mark.parametrize("optimizer", mostly_slow(OPTIMIZERS.values(), 2), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", ["rigl", "set_"])
def test_the_result_is_that_of_jaxsparse_on_the_same_numbers(make, optimizer, kind):
    layer, optimizer, x, dy = trained(make, optimizer)
    old, before = layer.pattern, torch_to_jax(layer.weight.detach())
    tensors, fraction = [t.clone() for t in everything(layer, optimizer)], jnp.float32(0.3)
    if kind == "rigl":
        args = torch_to_jax((x, dy))
        want, pattern, _ = jax_dynamic.rigl(before, old, (), x=args[0], dy=args[1], drop_fraction=fraction)
        dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.3)
    else:
        torch.manual_seed(5)
        key = jax.random.key(int(torch.randint(2**31 - 1, ()).item()))
        want, pattern, _ = jax_dynamic.set_(key, before, old, (), drop_fraction=fraction)
        torch.manual_seed(5)
        dynamic.set_(layer, optimizer, drop_fraction=0.3)
    for ours, theirs in zip(layer.pattern.index, pattern.index, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(torch_to_jax(layer.weight.detach()), want)
    assert not all(map(np.array_equal, old.index, pattern.index))
    moved = [np.asarray(jax_dynamic.move(torch_to_jax(t.expand_as(tensors[0])), old, (), pattern)[0]) for t in tensors]
    grown = np.asarray(want).reshape(pattern.nnzb, -1).any(1) == 0
    for ours, theirs in zip(everything(layer, optimizer), moved, strict=True):
        ours, theirs = ours.expand_as(tensors[0]).numpy(), theirs.copy()
        theirs[grown] = 0  # dropped and grown again in one move
        np.testing.assert_array_equal(ours, theirs)


@each_layer
def test_everything_stays_the_same_object_and_training_goes_on(make):
    layer, optimizer, x, dy = trained(make, OPTIMIZERS["Adam"])
    held = [layer.weight, layer.weight.grad, *layer.buffers(), *optimizer.state[layer.weight].values()]
    dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.5)
    now = [layer.weight, layer.weight.grad, *layer.buffers(), *optimizer.state[layer.weight].values()]
    assert all(a is b for a, b in zip(held, now, strict=True))
    torch.testing.assert_close(layer(x), x @ layer.to_linear().weight.T + layer.bias)
    layer(x).square().sum().backward()
    optimizer.step()
    fresh = copy.deepcopy(layer)
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and torch.equal(other(x), layer(x))


def test_what_is_kept_goes_on_as_if_nothing_had_moved():
    layer, optimizer, x, dy = trained(LAYERS["entries"], OPTIMIZERS["Adam"])
    moments = optimizer.state[layer.weight]["exp_avg"]
    before = dict(
        zip(map(tuple, places(layer)), zip(layer.weight.tolist(), moments.tolist(), strict=True), strict=True)
    )
    dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.25)
    kept = grown = 0
    for place, *pair in zip(map(tuple, places(layer)), layer.weight.tolist(), moments.tolist(), strict=True):
        kept += tuple(pair) == before.get(place)
        grown += pair == [0.0, 0.0]
    assert grown == round(0.25 * layer.weight.numel()) and kept + grown == layer.weight.numel()


def test_a_schedule_compiles_once_and_half_precision_moves_too():
    layer, optimizer, x, dy = trained(LAYERS["blocks"], OPTIMIZERS["SGD"], torch.bfloat16)
    dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.3)
    compiled = jax_dynamic._rigl._cache_size()
    for fraction in (0.2, 0.1, 0.0):
        dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=fraction)
    assert jax_dynamic._rigl._cache_size() == compiled and layer.weight.dtype == torch.bfloat16


def test_an_average_moves_along_and_one_that_did_not_is_told_apart():
    layer, optimizer, x, dy = trained(LAYERS["entries"], OPTIMIZERS["SGD"])
    averages = [copy.deepcopy(layer) for _ in range(2)]
    for one in averages:
        nn.init.constant_(one.weight, 2.0)
    dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.3, averages=averages[:1])
    moved, left = averages
    assert torch.equal(moved.order, layer.order) and moved(x).shape == layer(x).shape
    assert set(moved.weight.tolist()) == {0.0, 2.0} and (moved.weight == 0).sum() == round(0.3 * layer.weight.numel())
    with pytest.raises(ValueError, match="another pattern"):
        dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.3, averages=[left])


def test_layers_that_share_a_weight_move_once():
    layer, optimizer, x, dy = trained(LAYERS["entries"], OPTIMIZERS["SGD"])
    tied = copy.deepcopy(layer)
    tied.weight, twin = layer.weight, copy.deepcopy(layer)
    dynamic.rigl(twin, None, x=x, dy=dy, drop_fraction=0.3)
    dynamic.rigl(layer, optimizer, x=x, dy=dy, drop_fraction=0.3, averages=[tied])
    assert tied.weight is layer.weight and torch.equal(tied(x), layer(x)) and torch.equal(twin.weight, layer.weight)


def test_a_layer_without_an_optimizer_or_a_step_moves():
    layer = LAYERS["entries"]()
    before = layer.order.clone()
    dynamic.set_(layer, None, drop_fraction=0.5)
    assert not torch.equal(layer.order, before) and layer.weight.grad is None
    dynamic.set_(layer, torch.optim.Adam(layer.parameters()), drop_fraction=0.5)
    layer(torch.ones(1, 24))


class Strange(torch.optim.SGD):
    """Keeps something that is not the weight's shape."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["basis"] = torch.ones(3, 3)


WRONG = [
    (SparseLinear, torch.optim.SGD, {"drop_fraction": 1.5}, ValueError, r"1.5 is outside \[0, 1\]"),
    (SparseLinear, Strange, {}, NotImplementedError, r"Strange keeps 'basis' of \[3, 3\]"),
    (SparseLinear, torch.optim.LBFGS, {}, NotImplementedError, "LBFGS"),
    (SparseLinear, lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))]), {}, ValueError, "does not hold"),
    (SparseLinear, torch.optim.SGD, {"x": torch.ones(7, 5)}, ValueError, r"x and dy must be .*\(7, 5\)"),
]


@pytest.mark.parametrize("make, optimizer, options, error, reason", WRONG)
def test_what_cannot_move_is_refused_and_nothing_has_moved(make, optimizer, options, error, reason):
    layer = make(24, 18, 0.3)
    optimizer = optimizer(layer.parameters())
    if isinstance(optimizer, Strange):
        layer(torch.ones(2, 24)).sum().backward()
        optimizer.step()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=reason):
        dynamic.rigl(
            layer, optimizer, **{"x": torch.ones(7, 24), "dy": torch.ones(7, 18), "drop_fraction": 0.3, **options}
        )
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports
def test_other_layers_and_parametrized_weights_are_refused():
    layer = SparseLinear(24, 18, 0.3)
    nn.utils.parametrizations.weight_norm(layer, "weight", dim=None)
    with pytest.raises(NotImplementedError, match="parametrized"):
        dynamic.set_(layer, None, drop_fraction=0.3)
    with pytest.raises(TypeError, match="BlockDiagLinear has no pattern"):
        dynamic.set_(BlockDiagLinear(4, 4, 2), None, drop_fraction=0.3)
