"""Pictures of patterns: a raster of at most a given size, from which a plot, a notebook's image and text are made."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import numpy as np

from jaxsparse.formats import BlockPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET = "#22242b", "#767a85"
_MOST = 2**18  # entries that a picture looks at; of more, one of every k
_SHADES = " ░▒▓█"


class Raster(NamedTuple):
    """A pattern at the size of a picture.

    Attributes:
      shares: float [rows, cols], the stored share of the places in each cell, 0 to 1.
      exact: whether every cell is one block or entry.
    """

    shares: np.ndarray
    exact: bool

    @property
    def darkest(self) -> float:
        """The share to draw at full strength: a pattern that is even everywhere is half as dark."""
        return 1.0 if self.exact else max(self.shares.max(), min(1.0, 2 * self.shares.mean()), 1e-9)


def raster(pattern: BlockPattern, most: tuple[int, int]) -> Raster:
    """The pattern on at most `most` = (rows, cols) cells. Of a huge one, one of every k entries is looked at."""
    rows, cols = entries(pattern, _MOST)
    looked_at = max(len(rows), 1) / max(pattern.nnzb, 1)
    shares = np.minimum(count_cells(rows, cols, pattern.grid, most) / looked_at, 1)
    return Raster(shares, shares.shape == pattern.grid and looked_at == 1)


def count_cells(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int], most: tuple[int, int]) -> np.ndarray:
    """How many of these places fall into each of at most `most` cells, as a share of the places in it."""
    cells = [min(size, limit) for size, limit in zip(grid, most, strict=True)]
    r, c = (a.astype(np.int64) * n // size for a, n, size in zip((rows, cols), cells, grid, strict=True))
    counts = np.bincount(r * cells[1] + c, minlength=cells[0] * cells[1]).reshape(cells)
    heights, widths = (np.diff(-(-np.arange(n + 1) * size // n)) for n, size in zip(cells, grid, strict=True))
    return counts / np.outer(heights, widths)


def entries(pattern: BlockPattern, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) in blocks of the stored blocks, of the view; of more than `most`, one of every k."""
    step = max(1, -(-pattern.nnzb // most))
    at = np.arange(0, pattern.nnzb, step)
    if step > 1:  # one of each run of `step`: a fixed stride would show stripes that the pattern does not have
        at = np.minimum(at + np.random.default_rng(0).integers(0, step, len(at)), pattern.nnzb - 1)
    stored = np.asarray(pattern.row_index if step == 1 else pattern.row_index[at], np.int32)
    lines = np.searchsorted(np.asarray(pattern.col_ptr), at, "right") - 1
    return (lines, stored) if pattern.transposed else (stored, lines)


def plot_pattern(
    pattern: BlockPattern, axes: Axes | None = None, *, color: str = INK, title: str | None = None
) -> Axes:
    """Draws where a pattern stores: inputs from top to bottom, outputs from left to right.

    A pattern of more than 512 blocks along a side is drawn by density: how much of each cell is stored. Of more than
    262,144 blocks one of every k is looked at, so that a huge pattern takes no longer.

    Args:
      pattern: concrete; one, and no stack of them.
      axes: of matplotlib; None makes a figure.
      color: of what is stored.
      title: above the picture; None writes shape, block and density.
    Returns:
      The axes, for `axes.figure.savefig(...)`.
    Raises:
      ImportError: without matplotlib.
      ValueError: for a traced or abstract pattern, and for a stack of them.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import LinearSegmentedColormap
    except ImportError as error:
        raise ImportError("plot_pattern needs matplotlib: pip install 'jaxsparse[plots]'.") from error
    if not is_drawable(pattern):
        raise ValueError(
            f"only one concrete pattern can be drawn, got {pattern} as a tracer, in a stack, or elsewhere."
        )
    axes = axes or plt.subplots(figsize=(5.4, 5), layout="constrained")[1]
    drawn = raster(pattern, (512, 512))
    colors = LinearSegmentedColormap.from_list("stored", ["white", color])
    (rows, cols), (i, o) = pattern.grid, pattern.block
    extent = (0, cols * o, rows * i, 0)
    image = axes.imshow(
        100 * drawn.shares, cmap=colors, vmin=0, vmax=100 * drawn.darkest, extent=extent, interpolation="nearest"
    )
    axes.set(xlim=(0, pattern.shape[1]), ylim=(pattern.shape[0], 0), xlabel="output feature", ylabel="input feature")
    axes.set_aspect("equal" if max(pattern.shape) <= 4 * min(pattern.shape) else "auto")
    axes.set_title(caption(pattern) if title is None else title, fontsize=10)
    axes.locator_params(integer=True)
    if not drawn.exact:
        axes.figure.colorbar(image, ax=axes, label="stored, % of a cell", fraction=0.046, pad=0.03)
    return axes


def caption(pattern: BlockPattern) -> str:
    """Shape, block and density."""
    blocks = "" if pattern.is_unstructured else ", blocks of {}x{}".format(*pattern.block)
    return "{}x{}{}, {:.3g} % stored".format(*pattern.shape, blocks, 100 * pattern.density)


def is_drawable(pattern: BlockPattern) -> bool:
    """Whether the indices are numbers in this process, of one pattern."""
    arrays = (pattern.col_ptr, pattern.row_index)
    return all(a.ndim == 1 if isinstance(a, np.ndarray) else _is_here(a) and a.ndim == 1 for a in arrays)


def _is_here(a: Any) -> bool:
    known = isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer)
    return known and a.is_fully_addressable and not a.is_deleted()


def as_html(pattern: BlockPattern) -> str:
    """What a notebook shows: the repr, and an image of at most 96 x 96 cells where there are numbers."""
    text = f"<code>{html.escape(repr(pattern))}</code>"
    if not is_drawable(pattern):
        return text
    drawn = raster(pattern, (96, 96))
    shades = 255 - np.round(drawn.shares / drawn.darkest * 221).astype(np.uint8)
    rows, cols = (max(24, round(192 * size / max(pattern.shape))) for size in pattern.shape)
    style = f"width:{cols}px;height:{rows}px;image-rendering:pixelated;border:1px solid #c9c7c2"
    data = base64.b64encode(_png(shades)).decode()
    alt = f"{caption(pattern)}; inputs from top to bottom"
    return f'<div>{text}<br><img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{data}"></div>'


def as_lines(pattern: BlockPattern, most: tuple[int, int]) -> list[str]:
    """Text: a character for each cell, the darker the more of it is stored."""
    drawn = raster(pattern, most)
    levels = np.round(drawn.shares / drawn.darkest * (len(_SHADES) - 1)).astype(int)  # what is even has one shade
    levels = np.where(drawn.shares > 0, np.maximum(levels, 1), 0)
    return ["".join(_SHADES[level] for level in line) for line in levels]


def _png(gray: np.ndarray) -> bytes:
    """An 8-bit gray image, without a library that a notebook may lack."""
    lines = b"".join(b"\0" + line.tobytes() for line in gray)
    header = struct.pack(">IIBBBBB", gray.shape[1], gray.shape[0], 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    sealed = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)
