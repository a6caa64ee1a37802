"""RoBERTa with half of the blocks of 18 layers, trained beside the dense model it was made from.

The text is the source of Python's own standard library, one token per byte, 15 % of them masked. Both models see the
same batches and take turns, so that their times per step are taken side by side.

    pip install 'jaxsparse[examples,torch]'
    python examples/roberta.py           # 84 million parameters, about four minutes on two cores
    python examples/roberta.py --quick   # a tiny RoBERTa, in seconds
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from torch_bridge import sparsify

HALF = {"kind": "block_sparse", "density": 0.5, "block": 32}
RULES = [
    (r"roberta\.encoder\.layer\.[0-9]+\.intermediate\.dense", HALF),
    (r"roberta\.encoder\.layer\.[0-9]+\.output\.dense", HALF),
    (r"roberta\.encoder\.layer\.[0-9]+\.attention\.output\.dense", HALF),
]
FULL = RobertaConfig(
    vocab_size=52000,
    max_position_embeddings=514,
    num_attention_heads=12,
    num_hidden_layers=6,
    type_vocab_size=1,
)
TINY = RobertaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=256,
    max_position_embeddings=514,
    num_attention_heads=4,
    num_hidden_layers=2,
    type_vocab_size=1,
)
MASK, FIRST_BYTE = 4, 5  # RoBERTa's own special tokens are 0 to 4
COLORS = {"dense": "#4a4e59", "block-sparse": "#e8590c"}


def batches(steps: int, batch: int, length: int, seed: int):
    """(inputs, labels) of every step; labels are -100 where nothing is masked, as transformers wants it."""
    rng = np.random.default_rng(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - length, batch)
        tokens = torch.tensor(np.stack([text[s : s + length] for s in starts]).astype(np.int64) + FIRST_BYTE)
        hidden = torch.from_numpy(rng.random(tokens.shape) < 0.15)
        yield tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)


def train(models: dict[str, RobertaForMaskedLM], args) -> dict[str, np.ndarray]:
    """[steps, 2] of each model: loss and seconds."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), args.rate) for name, model in models.items()}
    log = {name: [] for name in models}
    for step, (inputs, labels) in enumerate(batches(args.steps, args.batch, args.length, args.seed)):
        for name, model in models.items():
            start = time.perf_counter()
            loss = model(input_ids=inputs, labels=labels).loss
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            log[name].append((loss.item(), time.perf_counter() - start))
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:4}  " + "  ".join(f"{name} {log[name][-1][0]:.3f}" for name in models), flush=True)
    return {name: np.array(rows) for name, rows in log.items()}


def draw(log: dict[str, np.ndarray], sizes: dict[str, int], path: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    for name, rows in log.items():
        losses, steps = rows[:, 0], np.arange(1, len(rows) + 1)
        mean = [losses[max(0, i - 9) : i + 1].mean() for i in range(len(losses))]
        for axis, x in zip(axes, (steps, steps * np.median(rows[:, 1])), strict=True):
            axis.plot(x, losses, color=COLORS[name], alpha=0.2, linewidth=1)
            axis.plot(x, mean, color=COLORS[name], linewidth=2.4, label=f"{name}, {sizes[name] / 1e6:.1f} M parameters")
    for axis, label in zip(axes, ("step", "seconds, at the median time per step"), strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="y", color="#e9e7e2")
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_ylabel("masked-byte loss (nats), and its mean over 10 steps")
    axes[0].legend(frameon=False)
    figure.suptitle("RoBERTa on Python's standard library, dense and with half of the blocks of 18 layers", x=0.5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny RoBERTa, in seconds")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes per row, at most 512 (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="learning rate (default: 3e-4, 3e-3 if --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/roberta.png", help="where the picture goes (default: %(default)s)")
    args = parser.parse_args()
    args.rate = args.rate or (3e-3 if args.quick else 3e-4)
    torch.manual_seed(args.seed)
    if args.quick:
        torch.set_num_threads(1)  # of so small a model, threads would only wait for one another

    dense = RobertaForMaskedLM(TINY if args.quick else FULL)
    sparse = copy.deepcopy(dense)
    print(sparsify(sparse, RULES, rescale=True))
    models = {"dense": dense, "block-sparse": sparse}
    log, sizes = train(models, args), {name: model.num_parameters() for name, model in models.items()}
    print(f"\n{'':14}{'parameters':>14}{'ms per step':>14}{'loss, last 10':>16}")
    for name, rows in log.items():
        ms, loss = 1e3 * np.median(rows[1:, 1]), rows[-10:, 0].mean()
        print(f"{name:14}{sizes[name]:>14,}{ms:>14.1f}{loss:>16.3f}")
    draw(log, sizes, args.out)
    print(f"\nLoss curves: {args.out}")


if __name__ == "__main__":
    main()
