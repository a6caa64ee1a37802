"""What a move of the pattern costs beside a training step, and what a layer weighs: python benchmarks/moving.py

Step and moves take turns in one process, A B C A B C; a step is forward, both gradients and Adam, on a layer of 4096 x
4096 at 10 % and batch 256. The last column spreads one RigL move over the hundred steps that papers leave between two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import BlockPattern, dynamic, spmm

DENSITY, BATCH, BETWEEN = 0.1, 256, 100
optimizer = optax.adam(1e-3)


@jax.jit
def step(blocks, pattern, state, x):
    loss = lambda blocks, x: jnp.square(spmm(x, blocks, pattern)).mean()  # noqa: E731
    grads, dx = jax.grad(loss, (0, 1))(blocks, x)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(blocks, updates), state, dx


@jax.jit
def rigl(blocks, pattern, state, x):
    return dynamic.rigl(blocks, pattern, state, x=x, dy=x[::-1], drop_fraction=0.3)


@jax.jit
def set_(blocks, pattern, state, x):
    return dynamic.set_(jax.random.key(1), blocks, pattern, state, drop_fraction=0.3)


def measure(size: int, block: int, rounds: int) -> dict:
    pattern = BlockPattern.random(jax.random.key(0), (size, size), density=DENSITY, block=block)
    blocks = jax.random.normal(jax.random.key(1), pattern.values_shape) * 0.05
    x, state = jax.random.normal(jax.random.key(2), (BATCH, size)), optimizer.init(blocks)
    times = {"step": [], "rigl": [], "set": []}
    for _ in range(rounds + 1):
        for name, call in (("step", step), ("rigl", rigl), ("set", set_)):
            start = time.perf_counter()
            jax.block_until_ready(call(blocks, pattern, state, x))
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: float(np.median(t[1:])) for name, t in times.items()}  # the first call compiles
    memory = rigl.lower(blocks, pattern, state, x).compile().memory_analysis()
    held = 4 * blocks.nbytes + sum(a.nbytes for a in pattern.index)  # weights, gradients, two moments; pattern
    return {
        "size": size,
        "block": block,
        "ms": ms,
        "rigl_in_steps": ms["rigl"] / ms["step"],
        "set_in_steps": ms["set"] / ms["step"],
        "amortised_percent": 100 * ms["rigl"] / ms["step"] / BETWEEN,
        "rigl_temporary_bytes": memory.temp_size_in_bytes,
        "dense_gradient_bytes": 4 * size**2,
        "memory_of_dense": held / (16 * size**2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", metavar="PATH.json")
    args = parser.parse_args()
    print("block    step     RigL        SET         RigL over 100 steps  RigL's temporaries  memory of dense")
    rows = [measure(args.size, block, args.rounds) for block in (1, 32)]
    for r in rows:
        ms = r["ms"]
        print(
            f"{r['block']:>5}{ms['step']:>8.1f}{ms['rigl']:>8.1f} ={r['rigl_in_steps']:>4.1f}x"
            f"{ms['set']:>7.1f} ={r['set_in_steps']:>4.1f}x{r['amortised_percent']:>12.1f} %"
            f"{r['rigl_temporary_bytes'] / 1e6:>18.1f} MB of {r['dense_gradient_bytes'] / 1e6:.0f}"
            f"{r['memory_of_dense']:>13.4f}"
        )
    if args.out:
        about = {
            "command": f"python benchmarks/moving.py --size {args.size} --rounds {args.rounds}",
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "load": os.getloadavg()},
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        }
        Path(args.out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
