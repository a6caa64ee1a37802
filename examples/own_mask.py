"""Your own mask: only the weights that it allows exist. 2048 features, batch 256, a fixed random tenth of them."""

import sys
import time

import jax
import numpy as np
import optax

from jaxsparse import SparseDense

N, STEPS = 2048, int(sys.argv[1]) if sys.argv[1:] else 60
rng, optimizer = np.random.default_rng(0), optax.adam(3e-3)
mask = rng.random((N, N)) < 0.1
teacher = (mask * rng.normal(size=(N, N)) / np.sqrt(0.1 * N)).astype(np.float32)
layer = SparseDense(N, mask=mask)
pattern = layer.init(jax.random.key(0), np.zeros((1, N), np.float32))
params = pattern.pop("params")  # floats; what stays in `pattern` is integers
dense = {**params, "kernel": pattern["pattern"]["pattern"].to_dense(params["kernel"])}  # the same start
models = {
    "SparseDense(mask)": (lambda p, x: layer.apply({"params": p, **pattern}, x), params),
    "x @ (mask * dense)": (lambda p, x: x @ (mask * p["kernel"]) + p["bias"], dense),
}


@jax.jit(static_argnums=0)
def step(apply, params, opt_state, x, y):
    loss, grads = jax.value_and_grad(lambda p: ((apply(p, x) - y) ** 2).mean())(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return loss, optax.apply_updates(params, updates), opt_state


state, log = {name: (p, optimizer.init(p)) for name, (_, p) in models.items()}, {name: [] for name in models}
for x in rng.standard_normal((STEPS, 256, N), np.float32):
    for name, (apply, _) in models.items():  # they take turns, so that both times see the same machine
        y, start = x @ teacher, time.perf_counter()
        loss, *state[name] = jax.block_until_ready(step(apply, *state[name], x, y))
        log[name].append((float(loss), 1e3 * (time.perf_counter() - start)))
for name, ((first, _), *_, (last, _)) in log.items():
    size, ms = sum(p.size for p in state[name][0].values()), np.median(log[name], axis=0)[1]
    print(f"{name:18}  loss {first:.3f} -> {last:.3f}  {size:>9,} parameters  {ms:.1f} ms per step")
