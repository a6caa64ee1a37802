"""Trains one small classifier dense, and sparse with a pattern that stays (static) or moves (SET, RigL).

All see the same batches; the sparse ones keep equally many weights, spread over the layers by `pruning.erk`.

    pip install 'jaxsparse[examples]'
    python examples/moving_patterns.py                      # scikit-learn's digits, a minute
    python examples/moving_patterns.py --data mnist.npz     # MNIST's arrays, as in examples/_data.py
    python examples/moving_patterns.py --data mnist.npz --sparsity 0.9 0.95 0.98 --seeds 3 --out numbers.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Split, load
from _pattern_picture import draw

import jaxsparse
from jaxsparse import BlockPattern, dynamic, pruning, spmm

HIDDEN = (300, 100)  # LeNet-300-100, the network of the papers
METHODS = ("dense", "static", "SET", "RigL")
DROP_FRACTION, MOVES, BATCH, LEARNING_RATE = 0.3, 60, 128, 1e-3


class Run(NamedTuple):
    """Everything that training changes; the patterns of a dense network are None."""

    params: dict[str, dict[str, jax.Array]]
    patterns: dict[str, BlockPattern | None]
    opt_state: Any
    step: jax.Array


optimizer = optax.adam(LEARNING_RATE)


def start(key: jax.Array, sizes: tuple[int, ...], sparsity: float | None) -> Run:
    """He's initial values, by the number of inputs that an output has."""
    shapes = {f"layer_{k}": shape for k, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))}
    densities = pruning.erk(shapes, 1 - sparsity) if sparsity else dict.fromkeys(shapes)
    params, patterns = {}, {}
    for name, own in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        pattern = BlockPattern.random(own, shapes[name], density=densities[name]) if sparsity else None
        shape, fan_in = (pattern.values_shape, pattern.fan_in) if pattern else (shapes[name], shapes[name][0])
        kernel = jax.random.normal(jax.random.fold_in(own, 1), shape) * np.sqrt(2 / fan_in)
        params[name], patterns[name] = {"kernel": kernel, "bias": jnp.zeros(shapes[name][1])}, pattern
    return Run(params, patterns, optimizer.init(params), jnp.int32(0))


def forward(params, patterns, x, probes=None):
    """Logits, and the input of every layer. A probe is zeros, added before the activation: its gradient is dy."""
    inputs = {}
    for name, p in params.items():
        inputs[name] = x
        pattern = patterns[name]
        x = x @ p["kernel"] + p["bias"] if pattern is None else spmm(x, p["kernel"], pattern, p["bias"])
        x = x if probes is None else x + probes[name]
        x = x if name == list(params)[-1] else jax.nn.relu(x)
    return x, inputs


def gradients(run: Run, images, labels):
    """Of the loss: by the parameters, and by the output of every layer (dy); and the layers' inputs."""
    probes = {name: jnp.zeros((len(images), p["bias"].size)) for name, p in run.params.items()}

    def loss(params, probes):
        logits, inputs = forward(params, run.patterns, images, probes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), inputs

    (grads, dy), inputs = jax.grad(loss, (0, 1), has_aux=True)(run.params, probes)
    return grads, dy, inputs


def move(method: str, drop_fraction, key: jax.Array, run: Run, images, labels) -> Run:
    """Every layer's pattern moves once."""
    _, dy, x = gradients(run, images, labels)
    params, patterns, opt_state = dict(run.params), dict(run.patterns), run.opt_state
    for k, (name, pattern) in enumerate(run.patterns.items()):
        kernel, how = params[name]["kernel"], {"drop_fraction": drop_fraction, "path": (name, "kernel")}
        if method == "RigL":
            kernel, patterns[name], opt_state = dynamic.rigl(kernel, pattern, opt_state, x=x[name], dy=dy[name], **how)
        else:
            layer_key = jax.random.fold_in(key, k)
            kernel, patterns[name], opt_state = dynamic.set_(layer_key, kernel, pattern, opt_state, **how)
        params[name] = {**params[name], "kernel": kernel}
    return run._replace(params=params, patterns=patterns, opt_state=opt_state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_part(method: str, moves: bool, run: Run, data: Split, picks: jax.Array, key: jax.Array, drop_fraction) -> Run:
    """One step for every row of `picks`, then one move of the patterns. One program for the whole run."""

    def step(run: Run, pick):
        grads, _, _ = gradients(run, data.images[pick], data.labels[pick])
        updates, opt_state = optimizer.update(grads, run.opt_state)
        return Run(optax.apply_updates(run.params, updates), run.patterns, opt_state, run.step + 1), None

    run, _ = jax.lax.scan(step, run, picks)
    if not moves:
        return run
    return move(method, drop_fraction, key, run, data.images[picks[-1]], data.labels[picks[-1]])


@jax.jit
def accuracy(run: Run, test: Split) -> jax.Array:
    return (forward(run.params, run.patterns, test.images)[0].argmax(-1) == test.labels).mean()


class Trained(NamedTuple):
    run: Run
    seconds: float  # without the first part, which compiles
    accuracies: list[float]  # after every part
    connections: list[np.ndarray]  # of every input, after every part


def train(method: str, sparsity: float, seed: int, data: Split, test: Split, steps: int) -> Trained:
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    run = start(key, (data.images.shape[1], *HIDDEN, 10), None if method == "dense" else sparsity)
    part, seconds, accuracies, connections = steps // MOVES, [], [], []
    drop_fraction = optax.cosine_decay_schedule(DROP_FRACTION, int(0.75 * MOVES))
    for k in range(MOVES):
        if run.patterns["layer_0"] is not None:
            connections.append(np.bincount(run.patterns["layer_0"].rows, minlength=data.images.shape[1]))
        picks, begin = rng.integers(0, len(data.labels), (part, BATCH)), time.perf_counter()
        moves = method in ("SET", "RigL")
        run = train_part(method, moves, run, data, picks, jax.random.fold_in(key, k), drop_fraction(k))
        jax.block_until_ready(run)
        seconds.append(time.perf_counter() - begin)
        accuracies.append(float(accuracy(run, test)))
    return Trained(run, sum(seconds[1:]), accuracies, connections)


def row(trained: Trained) -> dict[str, float]:
    """What the table says of a run; accuracy is the mean over the last sixth, as single ones jump."""
    nbytes = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))  # noqa: E731
    return {
        "accuracy": float(np.mean(trained.accuracies[-MOVES // 6 :])),
        "parameters": sum(a.size for a in jax.tree.leaves(trained.run.params)),
        "optimizer_bytes": nbytes(trained.run.opt_state),
        "pattern_bytes": nbytes(trained.run.patterns),
        "seconds": trained.seconds,
    }


def print_row(sparsity: float, method: str, rows: list[dict[str, float]]) -> None:
    accuracies = [100 * r["accuracy"] for r in rows]
    print(
        f"{sparsity:>8.0%} {method:8}{np.mean(accuracies):>8.2f} %  ({min(accuracies):.2f} to {max(accuracies):.2f})"
        f"{rows[0]['parameters']:>10,}{rows[0]['optimizer_bytes'] / 1e3:>12,.0f} kB"
        f"{rows[0]['pattern_bytes'] / 1e3:>9,.0f} kB{np.median([r['seconds'] for r in rows]):>9.1f} s",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH.npz", help="MNIST's arrays; without it, scikit-learn's digits")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9], help="of all weights (default: 0.9)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 1200 on digits, 6000 with --data")
    parser.add_argument("--quick", action="store_true", help="120 steps, to see that it runs")
    parser.add_argument("--picture", default="out/moving_patterns.png", help="default: %(default)s")
    parser.add_argument("--out", metavar="PATH.json", help="where the numbers go, with the machine's")
    args = parser.parse_args()
    args.steps = 120 if args.quick else args.steps or (6000 if args.data else 1200)
    return args


def main() -> None:
    args = parse()
    data, test = (Split(*map(jnp.asarray, split)) for split in load(args.data))
    print(f"{len(data.labels):,} images, {args.steps} steps of {BATCH}, patterns move {MOVES} times")
    print(f"sparsity method  accuracy (over {args.seeds} seeds)  parameters  Adam's moments  pattern  training")
    table, pictures = [], {}
    for sparsity in args.sparsity:
        for method in METHODS:
            if method == "dense" and sparsity != args.sparsity[0]:
                continue
            trained = [train(method, sparsity, seed, data, test, args.steps) for seed in range(args.seeds)]
            rows = [row(one) for one in trained]
            table.append({"method": method, "sparsity": 0 if method == "dense" else sparsity, "seeds": rows})
            print_row(0 if method == "dense" else sparsity, method, rows)
            if sparsity == args.sparsity[-1] and method != "dense":
                pictures[method] = trained[0]
    draw({name: (t.connections, t.accuracies) for name, t in pictures.items()}, args.sparsity[-1], args.picture)
    print(f"Connections of every pixel over training: {args.picture}")
    if args.out:
        Path(args.out).write_text(json.dumps({**about(args), "table": table}, indent=1) + "\n")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were made with."""
    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxsparse": jaxsparse.__version__}
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    device = jax.devices()[0].device_kind
    return {
        "command": " ".join(["python examples/moving_patterns.py", *words]),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "device": device},
        "versions": {**versions, "optax": optax.__version__},
        "steps": args.steps,
    }


if __name__ == "__main__":
    main()
