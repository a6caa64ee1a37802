"""Three sparse layers of one's own, ten lines each, on jaxsparse's functions: random, top-k by magnitude, and moving.

python examples/three_layers.py          # add --quick for a few steps
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsparse import BlockPattern, dynamic, pruning, spmm
from jaxsparse.nnx import Pattern


class RandomSparse(nnx.Module):
    """A random pattern that stays: density * inputs * outputs parameters."""

    def __init__(self, inputs, outputs, density, *, rngs):
        self.pattern = Pattern(BlockPattern.random(rngs.params(), (inputs, outputs), density=density))
        pattern = self.pattern.get_value()
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), pattern.values_shape) / np.sqrt(pattern.fan_in))

    def __call__(self, x):
        return spmm(x, self.kernel[...], self.pattern.get_value())


class TopK(nnx.Module):
    """Dense parameters, of which the largest are used: the density, the fraction *kept*, falls in training."""

    def __init__(self, inputs, outputs, density, *, rngs, steps):
        self.density = pruning.polynomial(1.0, density, 0, steps // 2)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) / np.sqrt(inputs))
        self.step = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        return x @ pruning.top_k(self.kernel[...], self.density(self.step[...]), straight_through=True)


class Moving(RandomSparse):
    """As RandomSparse, and its pattern follows the gradient. The optimizer's state comes along."""

    def move(self, opt_state, x, dy):
        kernel, pattern = self.kernel[...], self.pattern.get_value()
        kernel, pattern, opt_state = dynamic.rigl(kernel, pattern, opt_state, x=x, dy=dy, drop_fraction=0.3)
        self.kernel[...] = kernel
        self.pattern.set_value(pattern)
        return opt_state


N, STEPS = 512, 40 if "--quick" in sys.argv else 400
rng, optimizer = np.random.default_rng(0), optax.adam(1e-2)
teacher = BlockPattern.from_mask(rng.random((N, N)) < 0.02)  # what is to be found: a fiftieth of the weights
truth = jnp.asarray(rng.normal(size=teacher.nnzb).astype(np.float32))


def squared_error(layer, x, y):
    return jnp.square(layer(x) - y).mean()


@nnx.jit
def train_step(layer, opt_state, x, y):
    loss, grads = nnx.value_and_grad(squared_error)(layer, x, y)
    params = nnx.state(layer, nnx.Param)
    updates, opt_state = optimizer.update(grads, opt_state)
    nnx.update(layer, optax.apply_updates(params, updates))
    return loss, opt_state


@nnx.jit
def move_step(layer, opt_state, x, y):
    return layer.move(opt_state, x, 2 * (layer(x) - y) / y.size)


for layer in (
    RandomSparse(N, N, 0.04, rngs=nnx.Rngs(0)),
    TopK(N, N, 0.04, rngs=nnx.Rngs(0), steps=STEPS),
    Moving(N, N, 0.04, rngs=nnx.Rngs(0)),
):
    opt_state, begin = optimizer.init(nnx.state(layer, nnx.Param)), time.perf_counter()
    for step in range(STEPS):
        x = rng.standard_normal((128, N), np.float32)
        y = spmm(x, truth, teacher)
        if isinstance(layer, TopK):
            layer.step[...] = jnp.int32(step)
        loss, opt_state = train_step(layer, opt_state, x, y)
        if isinstance(layer, Moving) and step % 10 == 9 and step < 0.8 * STEPS:
            opt_state = move_step(layer, opt_state, x, y)
        first = loss if step == 0 else first
    size = layer.kernel[...].size
    seconds = time.perf_counter() - begin
    print(f"{type(layer).__name__:13} loss {first:6.3f} -> {loss:6.3f} {size:>9,} parameters {seconds:6.1f} s")
