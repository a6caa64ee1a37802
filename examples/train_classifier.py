"""Trains the same classifier four times, its two hidden layers dense, block-diagonal, block-sparse and unstructured.

The three sparse ones keep exactly a tenth of the weights. The four are trained in lock-step, A B C D A B C D, so
that their times per step are taken side by side. Then the block-diagonal one goes on training in PyTorch.

    pip install 'jaxsparse[examples,torch]'
    python examples/train_classifier.py                              # scikit-learn's digits
    python examples/train_classifier.py --data mnist.npz --epochs 2  # train_images, train_labels, test_...
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import flax.core
import flax.linen as nn
import jax
import numpy as np
import optax
from _data import Split, batches, load
from _report import Row, draw, print_table
from tqdm import tqdm

from jaxsparse import BlockDiagDense, BlockPattern, BlockSparseDense, SparseDense

NUM_BLOCKS, BLOCK, DENSITY = 10, 32, 0.1
LAYERS = {
    "dense": nn.Dense,
    "block-diagonal": functools.partial(BlockDiagDense, num_blocks=NUM_BLOCKS),
    "block-sparse": functools.partial(BlockSparseDense, density=DENSITY, block=BLOCK),
    "unstructured": functools.partial(SparseDense, density=DENSITY),
}
LEARNING_RATE = 1e-3


class MLP(nn.Module):
    """pixels -> width -> width -> width -> 10 classes. `layer` makes the two hidden width x width layers.

    The first and the last layer are dense in all four models: they are small, and sparsity saves little there.
    """

    width: int
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width, name="first")(images))
        x = nn.relu(self.layer(self.width, name="hidden_0")(x))
        x = shuffle(x, NUM_BLOCKS)
        x = nn.relu(self.layer(self.width, name="hidden_1")(x))
        return nn.Dense(10, name="last")(x)


# Two block-diagonal layers in a row would be ten separate networks. So between them features are dealt out like
# cards (a transpose, as in ShuffleNet and Monarch), and every block of the second reads from every block of the
# first. A dense or randomly sparse layer doesn't care in which order its inputs come.
def shuffle(x: jax.Array, num_blocks: int) -> jax.Array:
    return x.reshape(len(x), num_blocks, -1).swapaxes(1, 2).reshape(x.shape)


@dataclasses.dataclass
class Training:
    """One model on its way, with the loss and the seconds of every step so far."""

    model: MLP
    params: Any
    patterns: Any  # the "pattern" collection of the sparse layers: integers, which Optax never sees
    opt_state: Any
    step: Callable
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def advance(self, batch: Split) -> None:
        start = time.perf_counter()
        new = self.step(self.params, self.opt_state, self.patterns, batch)
        self.params, self.opt_state, loss = jax.block_until_ready(new)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss))

    def logits(self, images: np.ndarray) -> jax.Array:
        return jax.jit(self.model.apply)({"params": self.params, **self.patterns}, images)


def start(model: MLP, images: np.ndarray, seed: int) -> Training:
    optimizer = optax.adam(LEARNING_RATE)
    patterns, params = flax.core.pop(jax.jit(model.init)(jax.random.key(seed), images), "params")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, patterns, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, patterns, model, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return Training(model, params, patterns, optimizer.init(params), step)


def loss_of(params, patterns, model: MLP, batch: Split) -> jax.Array:
    logits = model.apply({"params": params, **patterns}, batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def train(runs: dict[str, Training], data: Split, epochs: int, batch: int, seed: int) -> None:
    """All models see the same batches in the same order, and take turns."""
    rng = np.random.default_rng(seed)
    with tqdm(total=epochs * (len(data.labels) // batch), unit="step", disable=None) as bar:  # None: quiet in a file
        for _ in range(epochs):
            for images in batches(data, batch, rng):
                for run in runs.values():
                    run.advance(images)
                bar.set_postfix({name: f"{run.losses[-1]:.3f}" for name, run in runs.items()}, refresh=False)
                bar.update()


def accuracy(logits, labels: np.ndarray) -> float:
    return float((np.asarray(logits).argmax(-1) == labels).mean())


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(name: str, run: Training, test: Split, batch: Split) -> Row:
    """Bytes are of the arrays at hand, time is the median over all steps but the two that compile and warm up."""
    # Gradients live only inside a step: these are the arrays that it makes, by shape and dtype.
    grads = jax.eval_shape(jax.grad(lambda params: loss_of(params, run.patterns, run.model, batch)), run.params)
    return Row(
        name,
        accuracy(run.logits(test.images), test.labels),
        parameters=sum(p.size for p in jax.tree.leaves(run.params)),
        state_bytes=nbytes(run.params) + nbytes(grads) + nbytes(run.opt_state),
        pattern_bytes=nbytes(run.patterns),
        ms_per_step=1e3 * float(np.median(run.seconds[2:] or run.seconds)),
    )


def hidden_weight(run: Training) -> np.ndarray:
    """The second hidden layer's weight as a dense matrix (in, out), for the picture."""
    kernel, width = run.params["hidden_1"]["kernel"], run.model.width
    if "pattern" in run.patterns:
        kernel = run.patterns["pattern"]["hidden_1"]["pattern"].to_dense(kernel)
    elif kernel.ndim == 3:
        kernel = BlockPattern.block_diagonal(NUM_BLOCKS, width // NUM_BLOCKS).to_dense(kernel)
    return np.asarray(kernel)


def continue_in_torch(run: Training, data: Split, test: Split, batch: int, seed: int) -> None:
    """Wraps the trained Flax model as a torch.nn.Module, compares the logits, and trains it for one more epoch."""
    if importlib.util.find_spec("torch") is None:
        print("\nPyTorch is not installed: leaving out the part that goes on in PyTorch (pip install torch).")
        return
    import torch

    import torch_bridge

    model = torch_bridge.from_flax(run.model, {"params": run.params, **run.patterns})
    images = torch.from_numpy(test.images)
    with torch.no_grad():
        before = model(images).numpy()
    difference = np.abs(before - np.asarray(run.logits(test.images))).max()
    print(
        "\nThe trained block-diagonal model as a torch.nn.Module, which runs the same XLA code on torch's parameters:"
    )
    print(f"  largest difference between torch's and JAX's logits  {difference:.1e}")

    # A fresh Adam has no moments yet: at the full rate its first steps would throw a trained model off.
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE / 10)
    for part in batches(data, batch, np.random.default_rng(seed)):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(part.images))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels).long()).backward()
        optimizer.step()
    with torch.no_grad():
        after = model(images).numpy()
    print(f"  test accuracy before one more epoch with torch.optim.Adam  {accuracy(before, test.labels):.1%}")
    print(f"  test accuracy after it  {accuracy(after, test.labels):.1%}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH.npz", help="MNIST's arrays; without it, scikit-learn's digits")
    parser.add_argument("--epochs", type=int, help="default: 15 on digits, 2 with --data")
    parser.add_argument("--width", type=int, default=1920, help="hidden features, a multiple of 320 (default: 1920)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--out", default="out/train_classifier.png", help="where the picture goes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.width < 1 or args.width % (NUM_BLOCKS * BLOCK):
        parser.error(f"--width {args.width}: {NUM_BLOCKS} blocks, and tiles of {BLOCK}, want a multiple of 320.")
    if args.epochs is None:
        args.epochs = 2 if args.data else 15
    return args


def main() -> None:
    args = parse()
    data, test = load(args.data, args.seed)
    print(f"{len(data.labels):,} training and {len(test.labels):,} test images of {data.images.shape[1]} pixels.")
    print(
        f"Training four models of width {args.width} for {args.epochs} epochs of batches of {args.batch} ...",
        flush=True,
    )
    sample = Split(*(a[: args.batch] for a in data))
    runs = {name: start(MLP(args.width, layer), sample.images, args.seed) for name, layer in LAYERS.items()}
    train(runs, data, args.epochs, args.batch, args.seed)

    continue_in_torch(runs["block-diagonal"], data, test, args.batch, args.seed)
    rows = [measure(name, run, test, sample) for name, run in runs.items()]
    print_table(rows)
    draw(rows, {name: (run.losses, run.seconds, hidden_weight(run)) for name, run in runs.items()}, args.out)
    print(f"\nLoss curves and weights: {args.out}")


if __name__ == "__main__":
    main()
