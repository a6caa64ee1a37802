"""How many floating-point operations a JAX function's products take: two for a multiply-add, nothing for the rest, as
torch.utils.flop_counter counts torch's own operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count(program: ClosedJaxpr) -> Any:
    """Those of a program, without what its results don't need. Sizes may be symbolic.

    A scan counts as often as it runs, a while loop once (nobody knows), a branch as the dearest of its kind.
    """
    jaxpr = program.jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Jaxpr) -> Any:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> Any:
    params, name = equation.params, equation.primitive.name
    shapes, results = ([v.aval.shape for v in side] for side in (equation.invars, equation.outvars))
    sparse = getattr(equation.primitive, "flops", None)
    if sparse is not None:  # a product of jaxsparse
        return sparse(shapes, results)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(results[0]) * math.prod(shapes[0][d] for d in contracted)
    if name == "conv_general_dilated":
        features, *window = params["dimension_numbers"].rhs_spec
        return 2 * math.prod(results[0]) * math.prod(shapes[1][d] for d in window) // math.prod(params["lhs_dilation"])
    inner = [_count(jaxpr) for jaxpr in _inside(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an equation runs."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item.jaxpr if isinstance(item, ClosedJaxpr) else item
