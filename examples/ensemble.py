"""An ensemble as one network: member m is block m of every BlockDiagDense, and all are trained in one go.

pip install 'jaxsparse[examples]' && python examples/ensemble.py --members 16 --width 64
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import batches, load

from jaxsparse import BlockDiagDense

parser = argparse.ArgumentParser()
for name, default in (("members", 16), ("width", 64), ("epochs", 20), ("batch", 128), ("seed", 0)):
    parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
args = parser.parse_args()


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = jnp.tile(images, args.members)  # every member gets its own copy of the input
        x = BlockDiagDense(args.members * args.width, args.members, activation="relu")(x)
        x = BlockDiagDense(args.members * args.width, args.members, activation="relu")(x)
        return BlockDiagDense(args.members * 10, args.members)(x).reshape(-1, args.members, 10)


class Loop(nn.Module):
    """The same ensemble, as one would write it without blocks."""

    @nn.compact
    def __call__(self, images):
        members = []
        for _ in range(args.members):
            x = nn.relu(nn.Dense(args.width)(images))
            x = nn.relu(nn.Dense(args.width)(x))
            members.append(nn.Dense(10)(x))
        return jnp.stack(members, axis=1)


def make_step(model, optimizer):
    def loss(params, batch):  # a sum over members: the gradient of each is that of its own loss
        logits = model.apply(params, batch.images)
        labels = jnp.repeat(batch.labels[:, None], args.members, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(axis=0).sum()

    @jax.jit
    def step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state)
        return optax.apply_updates(params, updates), opt_state

    return step


data, test = load(None, args.seed)
models, optimizer, rng = [Blocks(), Loop()], optax.adam(1e-3), np.random.default_rng(args.seed)
params = [jax.jit(model.init)(jax.random.key(args.seed), test.images) for model in models]
steps, states = [make_step(model, optimizer) for model in models], [(p, optimizer.init(p)) for p in params]
seconds = ([], [])
for batch in (batch for _ in range(args.epochs) for batch in batches(data, args.batch, rng)):
    for i, step in enumerate(steps):  # they take turns, so that both times see the same machine
        start = time.perf_counter()
        states[i] = jax.block_until_ready(step(*states[i], batch))
        seconds[i].append(time.perf_counter() - start)

logits = jax.jit(models[0].apply)(states[0][0], test.images)
members = (logits.argmax(-1) == test.labels[:, None]).mean(axis=0)
ensemble = (jax.nn.softmax(logits).mean(axis=1).argmax(-1) == test.labels).mean()
print(f"members: {members.min():.1%} to {members.max():.1%}, mean {members.mean():.1%}; ensemble: {ensemble:.1%}")
first, median = [s[0] for s in seconds], [1e3 * np.median(s[1:]) for s in seconds]
print(f"{'':22}{'blocks':>10}{'loop of nn.Dense':>18}{'ratio':>7}")
print(f"{'first step, compiling':22}{first[0]:>8.2f} s{first[1]:>16.2f} s{first[0] / first[1]:>7.2f}")
print(f"{'every other step':22}{median[0]:>7.2f} ms{median[1]:>15.2f} ms{median[0] / median[1]:>7.2f}")
