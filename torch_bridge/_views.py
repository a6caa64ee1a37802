"""Which operands of a call are kept as views of their memory from one call to the next. Knows no JAX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Views:
    """Where `dlpack.kept_operand` keeps the JAX arrays that lie in the memory of some operands of a call.

    For parameters: an optimizer writes into the memory that the view reads, so the view stays right, and it
    is given up as soon as the tensor is found elsewhere or of another kind. Copies and pickles start empty.
    On a GPU a kept view brings no order between the streams of torch and JAX; some operand of each call must be
    exchanged anew, as inputs, seeds and cotangents are.

    Args:
      places: the operands that stay where they are from call to call, as `FlatOp.places` names them.
    """

    def __init__(self, places: Iterable[str] = ()):
        self.kept: dict[str | None, Any] = dict.fromkeys(places)

    def __reduce__(self):
        return Views, (tuple(self.kept),)


NO_VIEWS = Views()
