"""`summary`: the layers of a model in a table. Knows no framework; each is asked for the rows of its models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
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
      flops: of the forward product, two for a multiply-add: of the whole call where inputs were given, else of one row
        of input; 0 for layers without a product, None where it is not known, as of a convolution without inputs.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    density: float
    parameters: int
    bytes: int
    flops: int | None


class Call(NamedTuple):
    """How many numbers went into a layer and came out, and how large its weight then was."""

    into: int
    out: int
    weight: int


class Product(NamedTuple):
    """What a layer multiplies: `flops` for each `unit` numbers of its output.

    Attributes:
      of_input: the unit is of the input instead, as of a transposed convolution.
      by_row: a row of the input makes one unit.
      weight: numbers of the weight; in a stack of layers, of all of them.
    """

    flops: int
    unit: int = 1
    of_input: bool = False
    by_row: bool = True
    weight: int = 0

    def made_in(self, calls: Sequence[Call] | None) -> int | None:
        """FLOPs of these calls; of one row where nobody called it."""
        if calls is None:
            return self.flops if self.by_row else None
        if calls and calls[0].weight < self.weight:  # a scan over a stack, which traces its body more than once
            calls = calls[:1]
        return sum(call.into if self.of_input else call.out for call in calls) * self.flops // self.unit


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
        """Of the call, or of one input row, in the layers where that is known."""
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


def summary(model: Any, *inputs: Any) -> Summary:
    """Every layer of a model: path, kind, shape, density, parameters, bytes, share of the FLOPs.

        summary(model)                # of NNX and PyTorch; FLOPs are those of one row
        summary(model, x)             # FLOPs of a call, those of convolutions too
        summary(model, variables, x)  # of Linen; x may be left out here as well

    Nothing is computed: the call is one on shapes.

    Args:
      model: a module of Flax NNX, PyTorch or Flax Linen.
      inputs: what it is called with: arrays, tensors (of PyTorch, on the meta device too), or what `jax.eval_shape`
        gives. Of Linen the variables come first, as in `apply`, or shapes of them; without inputs, the kinds of its
        layers are guessed from their parameters.
    Returns:
      A `Summary`. Layers that share a parameter, or are one, are counted once; the FLOPs are those of all their calls.
    Raises:
      TypeError: for what is no module; for a Linen module without variables, and for others with them.
    """
    framework = next((_FRAMEWORKS[c.__module__] for c in type(model).__mro__ if c.__module__ in _FRAMEWORKS), None)
    if framework is None:
        raise TypeError(f"summary takes a module of Flax NNX, Flax Linen or PyTorch, got {type(model).__name__}.")
    if (framework == "linen") != _begins_with_variables(inputs):
        how = "needs its variables: summary(model, variables)" if framework == "linen" else "has its parameters in it"
        raise TypeError(f"{type(model).__name__} is a module of {framework}, which {how}.")
    if framework == "torch":
        from torch_bridge.summary import rows

        return Summary(tuple(rows(model, inputs)))
    from jaxsparse.models import _summary_flax

    if framework == "nnx":
        return Summary(tuple(_summary_flax.nnx_rows(model, inputs)))
    return Summary(tuple(_summary_flax.linen_rows(model, inputs[0], inputs[1:])))


def _begins_with_variables(inputs: Sequence[Any]) -> bool:
    return bool(inputs) and isinstance(inputs[0], Mapping) and ("params" in inputs[0] or not inputs[0])


def of_unknown_kind(shapes: Mapping[str, tuple[int, ...]]) -> Product | None:
    """None if no parameter has two dimensions, else nobody knows."""
    return None if any(len(shape) > 1 for shape in shapes.values()) else Product(0)


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
