"""What a layer stores and computes, by its format: counts, bytes and operations. Arithmetic, without an array."""

from __future__ import annotations

import dataclasses
import math

from jaxsparse._sizes import INT32_MAX, as_pair, grid_of, is_unstructured

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
NAMES = {"dense": "dense", "block_diag": "block-diagonal", "block_sparse": "block-sparse", "sparse": "unstructured"}
_INDEX = 4  # bytes: int32
_PACKED = 16 * 2**20  # bytes of input that the kernels for single entries copy at a time


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer without bias, as far as its cost depends on it.

    Attributes:
      kind: "dense", "block_diag", "block_sparse" or "sparse".
      shape: (in, out).
      batch: rows of the input.
      block: (i, o) of the stored blocks; (1, 1) of single entries; the whole shape of a dense layer.
      stored: how many blocks are stored.
      dtype: of weights and input, by name.
    """

    kind: str
    shape: tuple[int, int]
    batch: int
    block: tuple[int, int]
    stored: int
    dtype: str = "float32"

    @property
    def weights(self) -> int:
        """Numbers that are stored, padding at the edges included."""
        return self.stored * self.block[0] * self.block[1]

    @property
    def kernels(self) -> str:
        """The kind whose kernels compute it: blocks of one entry are single entries."""
        return "sparse" if self.kind == "block_sparse" and is_unstructured(self.block) else self.kind

    @property
    def density(self) -> float:
        return self.stored / math.prod(grid_of(self.shape, self.block))

    @property
    def weight_bytes(self) -> int:
        return self.weights * ITEMSIZE[self.dtype]

    @property
    def moment_bytes(self) -> int:
        """Adam's two moments."""
        return 2 * self.weight_bytes

    @property
    def index_bytes(self) -> int:
        """The pattern: three numbers an entry, and the bounds of block rows and columns."""
        if self.kind in ("dense", "block_diag"):
            return 0
        return _INDEX * (3 * self.stored + sum(grid_of(self.shape, self.block)) + 2)

    @property
    def activation_bytes(self) -> int:
        """Input and output."""
        return self.batch * sum(self.shape) * ITEMSIZE[self.dtype]

    @property
    def temporary_bytes(self) -> int:
        """What a training step holds beside weights, their gradients and moments: input, output, the gradients of
        both, and what the kernels copy."""
        packed = min(self.batch * sum(self.shape) * 4, _PACKED) if self.kernels == "sparse" else 0
        return 2 * self.activation_bytes + packed

    @property
    def operations(self) -> int:
        """Multiplications and additions of a forward pass; forward and backward take three times as many."""
        return 2 * self.batch * self.weights

    @property
    def why_impossible(self) -> str | None:
        """Why there is no such layer, if there is none."""
        if self.index_bytes and self.stored > INT32_MAX:
            what = "entries" if is_unstructured(self.block) else "blocks"
            return f"it has {self.stored:.3g} {what}, more than int32 counts"
        return None

    def __str__(self) -> str:
        more = {"block_diag": f" x{self.stored}", "block_sparse": " {}x{}".format(*self.block)}
        return NAMES[self.kind] + more.get(self.kind, "")


def check(in_features: int, out_features: int, batch: int, density: float, dtype: str) -> None:
    """Raises ValueError for sizes below 1, a density outside of [0, 1] and an unknown dtype."""
    for name, size in (("in_features", in_features), ("out_features", out_features), ("batch", batch)):
        if isinstance(size, bool) or int(size) != size or size < 1:
            raise ValueError(f"{name}={size!r}: give a whole number of at least 1.")
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} is outside [0, 1]: it is the fraction of the weights that is kept.")
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype={dtype!r}: there is {', '.join(ITEMSIZE)}.")


def dense(shape: tuple[int, int], batch: int, dtype: str = "float32") -> Layer:
    return Layer("dense", shape, batch, shape, 1, dtype)


def sparse(shape: tuple[int, int], batch: int, density: float, dtype: str = "float32") -> Layer:
    """Single entries: at least one, unless the density is 0."""
    return Layer("sparse", shape, batch, (1, 1), _count(density, math.prod(shape)), dtype)


def block_sparse(shape: tuple[int, int], batch: int, density: float, block, dtype: str = "float32") -> Layer:
    """Blocks, no larger than the matrix: at least one, unless the density is 0."""
    i, o = as_pair(block)
    block = min(i, shape[0]), min(o, shape[1])
    return Layer("block_sparse", shape, batch, block, _count(density, math.prod(grid_of(shape, block))), dtype)


def block_diag(shape: tuple[int, int], batch: int, density: float, dtype: str = "float32") -> Layer:
    """As many blocks as come nearest to the density among those that divide both sizes."""
    common, wanted = math.gcd(*shape), math.log(1 / max(density, 1e-9))
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    n = min({*small, *(common // n for n in small)}, key=lambda n: abs(math.log(n) - wanted))
    return Layer("block_diag", shape, batch, (shape[0] // n, shape[1] // n), n, dtype)


def _count(density: float, all_of_them: int) -> int:
    return max(round(density * all_of_them), 1 if density > 0 else 0)
