"""`summary`: the layers of a model in a table. Knows no framework; each is asked for the rows of its models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

_FRAMEWORKS = {"torch.nn.modules.module": "torch", "flax.nnx.module": "nnx", "flax.linen.module": "linen"}


class Row(NamedTuple):
    """One layer that has parameters of its own.

    Attributes:
      path: dotted, as in the rules of `sparsify`; "" is the model itself.
      kind: the name of its class; of Linen's modules that were not called, what its parameters look like.
      shape: (in, out) of a linear layer; of any other, the shape of its largest parameter.
      block: (i, o) of a sparse or block-diagonal layer, else None.
      density: the fraction of the matrix that is stored; of a layer that torch.nn.utils.prune masks, that is kept.
      parameters: how many numbers are trained.
      bytes: of parameters and pattern.
      flops: of the forward product of one input row, two for a multiply-add; 0 for layers without a product, None where
        it depends on more than a row, as in a convolution.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    density: float
    parameters: int
    bytes: int
    flops: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The layers of a model: iterable row by row, and a table as text, in a terminal and in a notebook."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def flops(self) -> int:
        """Of one input row, in the layers where that is known."""
        return sum(row.flops or 0 for row in self.rows)

    def share(self, row: Row) -> float | None:
        """A row's part of `flops`; None where it is not known."""
        return None if row.flops is None else row.flops / max(self.flops, 1)

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts and lists, for JSON."""
        rows = [{**row._asdict(), "share_of_flops": self.share(row)} for row in self.rows]
        return {"rows": rows, "parameters": self.parameters, "bytes": self.bytes, "flops": self.flops}

    def __rich__(self) -> Any:
        return _table(self)

    def __repr__(self) -> str:
        from jaxsparse._text import as_text

        return as_text(self)


def summary(model: Any, variables: Any = None, *inputs: Any) -> Summary:
    """Every layer of a model: path, kind, shape, density, parameters, bytes, share of the FLOPs.

    Args:
      model: a Flax NNX module, a `torch.nn.Module`, or a Flax Linen module, which takes
      variables: what its `init` gave, or shapes of it, as `jax.eval_shape` gives them, and
      inputs: what it is called with, or shapes. Without, the kinds of Linen's layers are guessed from their parameters.
    Returns:
      A `Summary`. Layers that share a parameter, or are one, are counted once.
    Raises:
      TypeError: for what is no module; for a Linen module without variables, and for others with them.
    """
    framework = next((_FRAMEWORKS[c.__module__] for c in type(model).__mro__ if c.__module__ in _FRAMEWORKS), None)
    if framework is None:
        raise TypeError(f"summary takes a module of Flax NNX, Flax Linen or PyTorch, got {type(model).__name__}.")
    if (framework == "linen") != (variables is not None):
        how = "needs its variables: summary(model, variables)" if framework == "linen" else "has its parameters in it"
        raise TypeError(f"{type(model).__name__} is a module of {framework}, which {how}.")
    if framework == "torch":
        from torch_bridge.summary import rows

        return Summary(tuple(rows(model)))
    from jaxsparse.models import _summary_flax

    if framework == "nnx":
        return Summary(tuple(_summary_flax.nnx_rows(model)))
    return Summary(tuple(_summary_flax.linen_rows(model, variables, inputs)))


def dense_flops(shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Of a layer of unknown kind: none if no parameter has two dimensions, else nobody knows."""
    return None if any(len(shape) > 1 for shape in shapes.values()) else 0


def largest(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return max(shapes.values(), key=math.prod)


def _table(summed: Summary) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from jaxsparse._text import in_bytes

    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=True, footer_style="bold")
    table.add_column("path", "total", overflow="fold")
    for name in ("kind", "shape", "block"):
        table.add_column(name)
    table.add_column("density", justify="right")
    table.add_column("parameters", f"{summed.parameters:,}", justify="right")
    table.add_column("bytes", in_bytes(summed.bytes), justify="right")
    table.add_column("of FLOPs", justify="right")
    for row in summed.rows:
        share = summed.share(row)
        table.add_row(
            escape(row.path or "(the model)"),
            escape(row.kind),
            "x".join(map(str, row.shape)),
            "x".join(map(str, row.block)) if row.block else "",
            f"{row.density:.3g}",
            f"{row.parameters:,}",
            in_bytes(row.bytes),
            "?" if share is None else f"{share:.1%}",
        )
    return table
