"""How products split over devices: each computes its rows, or its diagonal blocks, and a sum over rows is added up.

A mesh of explicit axes says in the types how operands lie: then the result's type says so too, and the program has a
manual region. On a mesh of automatic axes XLA's partitioner asks, once it knows. Inside `jax.shard_map` there is
nothing to split, but a result varies over every mesh axis that an operand varies over.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax._src.config import _check_vma
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxsparse.products._rules import Product

Axes = Any  # what a PartitionSpec has in one place: a name, a tuple of names, None
Factor = tuple[str, int] | str | None


class Shards(NamedTuple):
    """The dimensions of operands and results, a letter each: B for all those of the batch, n for diagonal blocks (of
    features: the blocks of equal width in them), a dot for what is never split. Operands that are left out are never.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]


def asks_for_devices(product: Product) -> None:
    """What lowers to a partitioned call must say so to JAX."""
    prim_requires_devices_during_lowering.add(product)


def aligned(product: Product, operands: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """The operands as they must lie for each device to have what it multiplies.

    Raises:
      ValueError: on a mesh of explicit axes, if features are split that every row needs, or an axis does not divide
        the diagonal blocks.
    """
    types = [jax.typeof(a) for a in operands]
    varying = _varying(types)
    if varying:
        operands = [_varied(a, t, varying) for a, t in zip(operands, types, strict=True)]
    mesh = next((t.sharding.mesh for t in types if _explicit(t.sharding.mesh)), None)
    if mesh is None:
        return operands
    shapes = [t.shape for t in types]
    specs = [t.sharding.spec for t in types]
    layout = _Layout(product, shapes, product.shapes(*types, **params))
    axes = layout.axes(specs, [])
    layout.check(mesh, axes, specs)
    wanted = [layout.spec(factors, axes) for factors in layout.operands]
    return [
        a if spec == want else jax.sharding.reshard(a, NamedSharding(mesh, want))
        for a, spec, want in zip(operands, specs, wanted, strict=True)
    ]


def spread(row, like):
    """A row as often as `like` has rows, and where those are."""
    kind = jax.typeof(like)
    where = kind.sharding if _explicit(kind.sharding.mesh) else None
    return jax.lax.broadcast_in_dim(row, kind.shape, (kind.ndim - 1,), out_sharding=where)


def result_types(product: Product, types: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The types of results of these shapes: the dtype is that of the first operand."""
    first = types[0]
    layout = _Layout(product, [t.shape for t in types], shapes)
    axes = layout.axes([t.sharding.spec for t in types], [])
    manual = type(first.manual_axis_type)(varying=_varying(types))
    return [
        first.update(
            shape=shape,
            weak_type=False,
            sharding=first.sharding.update(spec=layout.spec(factors, axes)),
            manual_axis_type=manual,
        )
        for shape, factors in zip(shapes, layout.results, strict=True)
    ]


def split(product: Product, ctx: Any, local: Callable[..., list[Any]]) -> tuple[Callable[..., Any], list[Any]]:
    """`local`, a function of what one device has, as a function of whole arrays; and the types to trace it with.

    Those have no varying axes: kernels compute on one device and know no mesh.
    """
    types = [t.update(manual_axis_type=type(t.manual_axis_type)()) for t in ctx.avals_in]
    layout = _Layout(product, [t.shape for t in types], [t.shape for t in ctx.avals_out])
    mesh = next((t.sharding.mesh for t in types if _explicit(t.sharding.mesh)), None)
    if mesh is not None:
        return _in_manual_region(layout, mesh, [t.sharding.spec for t in types], local), types
    if (getattr(ctx.module_context.axis_context, "num_devices", 1) or 1) > 1:
        return _by_partitioner(layout, local), types
    return local, types


@contextlib.contextmanager
def on_one_device(ctx: Any) -> Iterator[None]:
    """Kernels are traced as if there were no mesh: one that is set would be part of the types of what they make.

    What kind of device it is stays known, as Pallas compiles for that kind and not for one of this process.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_device_of(ctx))), _check_vma(False):
        yield


def _device_of(ctx: Any) -> Any:
    """The kind of device that a program is lowered for, as a mesh that is set says, or JAX; None where nothing does."""
    if (here := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return here
    context = ctx.module_context.axis_context
    if devices := getattr(context, "device_assignment", None):
        # A process without the device lowers for it on those it has, which say nothing.
        one = Mesh(devices[:1], ("one",)) if devices[0].platform != "cpu" else None
        return one and one.abstract_mesh.abstract_device
    mesh = getattr(context, "mesh", None)
    return getattr(getattr(mesh, "abstract_mesh", mesh), "abstract_device", None)


# ---- the two ways ---------------------------------------------------------------------------------------


def _in_manual_region(layout: _Layout, mesh, specs, local):
    axes = layout.axes(specs, [])
    return jax.shard_map(
        lambda *a: layout.summed(local(*a), axes),
        mesh=mesh,
        in_specs=tuple(layout.spec(factors, axes) for factors in layout.operands),
        out_specs=[layout.spec(factors, axes) for factors in layout.results],
        axis_names=set(_explicit(mesh)),
        check_vma=False,
    )


def _by_partitioner(layout: _Layout, local):
    def partition(mesh, operands, results):
        specs = [[_spec_of(a.sharding, mesh) for a in side] for side in (operands, results)]
        axes = layout.dividing(mesh, layout.axes(*([spec or () for spec in side] for side in specs)))
        if None in specs[0]:
            warnings.warn(layout.unreadable(mesh), stacklevel=2)
        elif said := layout.torn(specs[0]):
            warnings.warn(f"{said} Until then every call gathers it.", stacklevel=2)
        into, out = (
            [NamedSharding(mesh, layout.spec(factors, axes)) for factors in side]
            for side in (layout.operands, layout.results)
        )
        return mesh, lambda *a: layout.summed(local(*a), axes), out, tuple(into)

    function = custom_partitioning(local)
    rule, whole, sizes = layout.rule()
    factors: dict[str, Any] = {"need_replication_factors": whole, **sizes}
    function.def_partition(partition=partition, sharding_rule=rule, decode_shardings=False, **factors)
    return function


def _spec_of(sharding, mesh) -> tuple[Axes, ...] | None:
    """How the partitioner means to split an array, or None if no spec says so: it splits an axis where it must."""
    try:
        return tuple(parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0])
    except (AttributeError, ValueError, NotImplementedError):
        return None


# ---- letters, axes and specs ----------------------------------------------------------------------------


class _Layout:
    """The factors of each dimension of a product's operands and results, and how axes of a mesh go to them."""

    def __init__(self, product: Product, operands: Sequence[tuple], results: Sequence[tuple]):
        dims, self.shapes = product.shards, (*operands, *results)
        missing = ("",) * (len(operands) - len(dims.operands))
        self.operands = [_factors(d, len(s)) for d, s in zip((*dims.operands, *missing), operands, strict=False)]
        self.results = [_factors(d, len(s)) for d, s in zip(dims.results, results, strict=True)]
        self.product = product

    def axes(self, operands: Sequence[Sequence[Axes]], results: Sequence[Sequence[Axes]]) -> dict[Factor, Axes]:
        """Which axes split which factor: the first operand that is split has its way, and an axis splits one factor."""
        found, taken = {}, set()
        for factors, spec in (*zip(self.operands, operands, strict=False), *zip(self.results, results, strict=False)):
            for factor, axes in zip(factors, spec, strict=False):
                if factor is not None and axes and factor not in found and not taken & set(_names(axes)):
                    found[factor] = axes
                    taken |= set(_names(axes))
        return found

    def spec(self, factors: Sequence[Factor], axes: dict[Factor, Axes]) -> PartitionSpec:
        return PartitionSpec(*(axes.get(factor) for factor in factors))

    def summed(self, results: Sequence[Any], axes: dict[Factor, Axes]) -> list[Any]:
        """Of the results, those that are sums over the batch are added up over the devices that share it."""
        over = tuple(name for factor, some in axes.items() if isinstance(factor, tuple) for name in _names(some))
        return [
            jax.lax.psum(y, over) if over and not _has_rows(factors) else y
            for y, factors in zip(results, self.results, strict=True)
        ]

    def size(self, factor: Factor) -> int:
        """How many rows there are, or diagonal blocks."""
        sides = zip((*self.operands, *self.results), self.shapes, strict=True)
        return min(shape[k] for factors, shape in sides for k, f in enumerate(factors) if f == factor)

    def dividing(self, mesh, axes: dict[Factor, Axes]) -> dict[Factor, Axes]:
        """The axes that share a factor out evenly; nothing is split by others, of which a warning tells."""
        uneven = {factor: self.uneven(mesh, factor, some) for factor, some in axes.items()}
        for said in filter(None, uneven.values()):
            warnings.warn(f"{said} Until then every device computes all of it, on gathered operands.", stacklevel=2)
        return {factor: some for factor, some in axes.items() if not uneven[factor]}

    def uneven(self, mesh, factor: Factor, axes: Axes) -> str | None:
        """Why these axes don't share a factor out evenly, if so."""
        size, count = self.size(factor), _count(mesh, axes)
        if size % count == 0:
            return None
        what = "rows" if isinstance(factor, tuple) else "diagonal blocks"
        return (
            f"{self.product.name} has {size} {what}, and mesh axis {axes!r} {count} devices, which can't share them "
            f"evenly: {size} = {size // count} x {count} + {size % count}. Use a number of {what} that {count} divides "
            f"(pad to {-(-size // count) * count}), or shard another dimension."
        )

    def unreadable(self, mesh) -> str:
        return (
            f"operands of {self.product.name} are split over devices of {dict(mesh.shape)} as neither its rows nor its "
            f"{self.size('n')} diagonal blocks can be: every device computes all of it, on gathered operands. Use a "
            "number of blocks that the devices divide, or shard another dimension."
        )

    def torn(self, specs: Sequence[Sequence[Axes] | None]) -> str | None:
        """What is wrong where an operand's features are split that every row needs, if so."""
        for factors, spec in zip(self.operands, specs, strict=True):
            if _has_rows(factors) and any(axes for f, axes in zip(factors, spec or (), strict=False) if f is None):
                return (
                    f"an operand of {self.product.name} is sharded as {PartitionSpec(*(spec or ()))}, but each row is "
                    "multiplied whole: its features must be on one device. Shard the batch, cut the matrix too "
                    "(BlockPattern.split), or gather it: jax.sharding.reshard(x, jax.P('batch axis', None))."
                )
        return None

    def check(self, mesh, axes: dict[Factor, Axes], specs: Sequence[Sequence[Axes]]) -> None:
        for said in filter(None, (self.uneven(mesh, factor, some) for factor, some in axes.items())):
            raise ValueError(said)
        if said := self.torn(specs):
            raise ValueError(said)

    def rule(self) -> tuple[str, tuple[str, ...], dict[str, int]]:
        """The same for XLA's partitioner, in its notation: a rule, the factors to keep whole, and sizes of factors.

        The features of rows are not among those that it keeps whole: it would gather them without a word.
        """
        whole, sizes = [], {}
        torn = (f"t{k}" for k in range(sum(map(len, self.operands))))

        def word(factor, size, of_rows: bool) -> str:
            if factor is None and of_rows:
                return next(torn)
            if factor is None:
                whole.append(f"w{len(whole)}")
                return whole[-1]
            if isinstance(factor, tuple):
                return f"b{factor[1]}"
            if size == self.size(factor):
                return factor
            whole.append(f"w{len(whole)}")
            sizes[whole[-1]] = size // self.size(factor)
            return f"({factor} {whole[-1]})"

        count = len(self.operands)
        words = [
            " ".join(word(f, size, k < count and _has_rows(factors)) for f, size in zip(factors, shape, strict=True))
            for k, (factors, shape) in enumerate(zip((*self.operands, *self.results), self.shapes, strict=True))
        ]
        return f"{', '.join(words[:count])} -> {', '.join(words[count:])}", tuple(whole), sizes


def _factors(dims: str, ndim: int) -> list[Factor]:
    if not dims:
        return [None] * ndim
    rest: list[Factor] = [None if letter == "." else letter for letter in dims.removeprefix("B")]
    return [*(("B", k) for k in range(ndim - len(rest))), *rest]


def _has_rows(factors: Sequence[Factor]) -> bool:
    return any(isinstance(factor, tuple) for factor in factors)


def _names(axes: Axes) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else (axes,)


def _count(mesh, axes: Axes) -> int:
    count = 1
    for name in _names(axes):
        count *= mesh.shape[name]
    return count


def _explicit(mesh) -> tuple[str, ...]:
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)


def _varying(types: Sequence[Any]) -> frozenset:
    return frozenset().union(*(t.manual_axis_type.varying for t in types))


def _varied(a, of_type, varying: frozenset):
    missing = tuple(sorted(varying - of_type.manual_axis_type.varying))
    return jax.lax.pcast(a, missing, to="varying") if missing else a
