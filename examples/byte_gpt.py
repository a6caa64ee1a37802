"""A small GPT on the bytes of Python's own library, its MLPs dense beside block-sparse and block-diagonal ones.

One sparse MLP is as wide as the dense one and has a quarter of its weights; two are four times as wide and have as many
weights, which in linear layers also means as many FLOPs. All see the same batches, in turns.

    python examples/byte_gpt.py          # some minutes; add --quick to see that it runs
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxsparse import BlockDiagLinear, BlockSparseLinear

FEATURES, HEADS, BLOCK, PART = 128, 4, 32, 4  # a sparse MLP keeps 1/PART of its weights
MLPS = {"dense": 1, "block-sparse": 1, "block-sparse, wide": PART, "block-diagonal, wide": PART}


def linear(kind: str, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    if kind.startswith("block-sparse"):
        return BlockSparseLinear(inputs, outputs, density=1 / PART, block=BLOCK, rngs=rngs)
    if kind.startswith("block-diagonal"):
        return BlockDiagLinear(inputs, outputs, PART, rngs=rngs)
    return nnx.Linear(inputs, outputs, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, kind: str, rngs: nnx.Rngs):
        hidden = 4 * FEATURES * MLPS[kind]
        self.norm_1, self.norm_2 = (nnx.RMSNorm(FEATURES, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.up, self.down = linear(kind, FEATURES, hidden, rngs), linear(kind, hidden, FEATURES, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norm_1(x)).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        # Features are dealt out like cards, so that the blocks of a block-diagonal `down` read from all those of `up`.
        hidden = jax.nn.gelu(self.up(self.norm_2(x)))
        hidden = hidden.reshape(*x.shape[:2], PART, -1).swapaxes(2, 3).reshape(hidden.shape)
        return x + self.down(hidden)


class GPT(nnx.Module):
    def __init__(self, kind: str, layers: int, context: int, rngs: nnx.Rngs):
        self.bytes, self.places = (nnx.Embed(n, FEATURES, rngs=rngs) for n in (256, context))
        self.blocks = nnx.List([Block(kind, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, 256, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.bytes(text) + self.places(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bits_per_byte(model: GPT, text: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:])
    return losses.mean() / np.log(2)


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, text: jax.Array) -> None:
    optimizer.update(model, nnx.grad(bits_per_byte)(model, text))


@nnx.jit
def test_loss(model: GPT, text: jax.Array) -> jax.Array:
    return bits_per_byte(model, text)


def library() -> tuple[np.ndarray, np.ndarray]:
    """The library's sources as bytes: every tenth file is for testing."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    return np.concatenate([t for k, t in enumerate(texts) if k % 10]), np.concatenate(texts[::10])


def draw(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    starts = rng.integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    steps, layers, context = (8, 1, 32) if args.quick else (args.steps, 3, 128)
    train, test = library()
    rng = np.random.default_rng(0)
    tests = draw(test, 16 if args.quick else 256, context + 1, rng)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps)
    models = {kind: GPT(kind, layers, context, nnx.Rngs(0)) for kind in MLPS}
    optimizers = {kind: nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param) for kind, model in models.items()}
    seconds = {kind: [] for kind in MLPS}
    print(f"{len(train) / 1e6:.1f} MB of Python, {steps} steps of 16 x {context} bytes")
    for _ in range(steps):
        text = draw(train, 16, context + 1, rng)
        for kind, model in models.items():
            start = time.perf_counter()
            train_step(model, optimizers[kind], text)
            jax.block_until_ready(nnx.state(model))
            seconds[kind].append(time.perf_counter() - start)
    print(f"{'MLP':22}{'bits per byte':>14}{'parameters':>12}{'of MLPs':>10}{'Adam state':>13}{'step':>10}")
    for kind, model in models.items():
        parameters = sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
        of_mlps = sum(layer.kernel[...].size for block in model.blocks for layer in (block.up, block.down))
        state = sum(a.nbytes for a in jax.tree.leaves(nnx.state(optimizers[kind], nnx.OptState)))
        print(
            f"{kind:22}{test_loss(model, tests):>14.3f}{parameters:>12,}{of_mlps:>10,}{state / 1e6:>10.1f} MB"
            f"{1e3 * np.median(seconds[kind][2:]):>7.1f} ms"
        )


if __name__ == "__main__":
    main()
