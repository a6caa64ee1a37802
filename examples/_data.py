"""The images that the examples train on: scikit-learn's bundled digits, or MNIST from an .npz file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Pixels in [0, 1], one row per image, and classes 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


def load(path: str | None, seed: int = 0) -> tuple[Split, Split]:
    """Training and test images: those of the .npz file at `path`, or 1,797 digits of 8 x 8 pixels.

    The file holds MNIST's arrays: train_images, train_labels, test_images, test_labels, pixels 0 to 255.
    """
    if path is None:
        return _digits(seed)
    with np.load(path) as file:
        return tuple(_split(file[f"{part}_images"], file[f"{part}_labels"], 255) for part in ("train", "test"))


def batches(split: Split, size: int, rng: np.random.Generator) -> Iterator[Split]:
    """One epoch in random order; what is left after the last whole batch waits for another epoch."""
    order = rng.permutation(len(split.labels))
    for start in range(0, len(order) - size + 1, size):
        pick = order[start : start + size]
        yield Split(split.images[pick], split.labels[pick])


def _digits(seed: int) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits  # here, so that --data needs no scikit-learn

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    everything = _split(digits.images[order], digits.target[order], 16)
    cut = len(order) * 4 // 5
    return Split(*(a[:cut] for a in everything)), Split(*(a[cut:] for a in everything))


def _split(images: np.ndarray, labels: np.ndarray, white: int) -> Split:
    return Split(images.reshape(len(images), -1).astype(np.float32) / white, labels.astype(np.int32))
