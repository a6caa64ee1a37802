"""What each way of sharding a sparse layer sends over the wire in a step, and where it stops paying: docs/scaling.md.

    python benchmarks/scaling.py             # the tables of the document, from the formula; --help has the parameters
    python benchmarks/scaling.py --count     # the collectives of real programs on 8 CPU devices, beside the formula

A step is the forward product and both gradients. Bytes are what one device sends; rings are assumed, as NCCL uses them:
an all-reduce of V bytes sends 2 (n - 1) / n V, an all-gather or a reduce-scatter half of that.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import NamedTuple

WAYS = ("batch", "diagonal blocks", "columns", "rows", "nnz", "batch x columns")
DEVICES = [2**k for k in range(3, 13)]
ITEMSIZE = {"f16": 2, "bf16": 2, "f32": 4}


class Layer(NamedTuple):
    """One product: `rows` inputs in all, a matrix of features x features of which nnz numbers are stored."""

    rows: int
    features: int
    nnz: int
    itemsize: int = 2


class Machine(NamedTuple):
    """Rates of one device in one direction, per second."""

    flops: float
    hbm: float
    nvlink: float
    infiniband: float
    per_node: int = 8


class Collective(NamedTuple):
    """One collective: its kind, the bytes of what it makes whole (gathered or reduced), and over how many devices."""

    kind: str
    nbytes: float
    devices: int

    @property
    def sent(self) -> float:
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (self.devices - 1) / self.devices * self.nbytes


def collectives(way: str, layer: Layer, devices: int, model: int = 4) -> list[Collective]:
    """Those of a step. `model`: of "batch x columns", how many devices share the columns."""
    activations, values = layer.rows * layer.features * layer.itemsize, layer.nnz * layer.itemsize
    batch = devices // model
    return {
        "batch": [Collective("all-reduce", values, devices)],  # dW
        "diagonal blocks": [],
        "columns": [Collective("all-reduce", activations, devices)],  # dx
        "rows": [Collective("all-reduce", activations, devices)],  # y
        "nnz": [Collective("all-gather", values, devices), Collective("reduce-scatter", values, devices)],  # W, dW
        "batch x columns": [
            Collective("all-reduce", activations / batch, model),  # dx of the rows that they share
            Collective("all-reduce", values / model, batch),  # dW of the columns that each has
        ],
    }[way]


def seconds(way: str, layer: Layer, machine: Machine, devices: int, model: int = 8) -> tuple[float, float]:
    """(products, wire) of a step. Products at the full rate of the device or of its memory: what makes sharing hard."""
    inputs, outputs, values = shares(way, devices, model)
    moved = layer.rows * layer.features * (1 / inputs + 1 / outputs) + layer.nnz / values
    products = max(6 * layer.rows * layer.nnz / devices / machine.flops, 3 * moved * layer.itemsize / machine.hbm)
    wire = 0.0
    for c in collectives(way, layer, devices, model):
        inside = devices <= machine.per_node or (way == "batch x columns" and c.devices == model <= machine.per_node)
        wire += c.sent / (machine.nvlink if inside else machine.infiniband)
    return products, wire


def shares(way: str, devices: int, model: int) -> tuple[int, int, int]:
    """Of the inputs, the outputs and the values, each device has one part of so many."""
    return {
        "batch": (devices, devices, 1),
        "diagonal blocks": (devices, devices, devices),
        "columns": (1, devices, devices),
        "rows": (devices, 1, devices),
        "nnz": (devices, devices, 1),  # gathered for the products
        "batch x columns": (devices // model, devices, model),
    }[way]


# ---- the tables ----------------------------------------------------------------------------------------


def bytes_table(layer: Layer) -> str:
    lines = ["| devices | " + " | ".join(WAYS) + " |", "| ---: |" + " ---: |" * len(WAYS)]
    for n in DEVICES:
        sent = [sum(c.sent for c in collectives(way, layer, n, 8)) / 1e6 for way in WAYS]
        lines.append(f"| {n:,} | " + " | ".join(f"{s:,.1f}" for s in sent) + " |")
    return "\n".join(lines)


def first_too_many(way: str, layer: Layer, machine: Machine) -> str:
    """The number of devices from which on the wire takes longer than the products."""
    for n in DEVICES:
        products, wire = seconds(way, layer, machine, n)
        if wire > products:
            return f"{n:,}"
    return "never"


def time_table(layer: Layer, machine: Machine) -> str:
    """Milliseconds of products + wire; in bold where the wire takes longer."""

    def cell(way, n):
        products, wire = (1e3 * t for t in seconds(way, layer, machine, n))
        text = f"{products:.2f} + {wire:.2f}"
        return f"**{text}**" if wire > products else text

    lines = ["| devices | " + " | ".join(WAYS) + " |", "| ---: |" + " ---: |" * len(WAYS)]
    lines += [f"| {n:,} | " + " | ".join(cell(way, n) for way in WAYS) + " |" for n in DEVICES]
    stops = [first_too_many(way, layer, machine) for way in WAYS]
    return "\n".join([*lines, "| stops paying at | " + " | ".join(stops) + " |"])


# ---- counted in programs -----------------------------------------------------------------------------------


def counted() -> dict[str, tuple[list[Collective], list[Collective]]]:
    """Of each way, the collectives of the program that XLA compiles for 8 CPU devices, and those of the formula."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from jaxsparse import BlockPattern, block_diag_matmul, spmm

    rows, size, block, model = 64, 512, 16, 4
    pattern = BlockPattern.random(jax.random.key(0), (size, size), density=0.25, block=block)
    by_8, by_4 = (pattern.split(n, 1) for n in (8, model))
    by_rows, diagonals = pattern.split(8, 0), jnp.ones((8, 64, 64))
    x, blocks = jnp.ones((rows, size)), jnp.ones(pattern.values_shape)
    line = jax.sharding.Mesh(jax.devices(), ("d",))
    grid = jax.sharding.Mesh(np.array(jax.devices()).reshape(8 // model, model), ("batch", "model"))

    def batch(x, w, dy):
        y, back = jax.vjp(lambda x, w: spmm(x, w, pattern), x, w)
        dx, dw = back(dy)
        return y, dx, jax.lax.psum(dw, "d")

    def diagonal(x, w, dy):
        y, back = jax.vjp(block_diag_matmul, x, w)
        return y, *back(dy)

    def columns(x, w, dy, parts, axis="d"):
        y, back = jax.vjp(lambda x, w: parts.cut(spmm(x, w[0], parts.own)), x, w)
        dx, dw = back(dy)
        return y, jax.lax.psum(dx, axis), dw

    def by_row(x, w, dy, parts):
        y, back = jax.vjp(lambda x, w: spmm(parts.fit(x), w[0], parts.own), x, w)
        return jax.lax.psum(y, "d"), *back(dy)

    def nnz(x, w, dy):
        y, back = jax.vjp(lambda x, w: spmm(x, w, pattern), x, jax.lax.all_gather(w, "d", tiled=True))
        dx, dw = back(dy)
        return y, dx, jax.lax.psum_scatter(dw, "d", tiled=True)

    def both(x, w, dy, parts):
        y, dx, dw = columns(x, w, dy, parts, "model")
        return y, dx, jax.lax.psum(dw, "batch")

    of, slices, whole = P("d"), P(None, "d"), P()
    two = P("batch", "model")
    programs = {
        "batch": (line, batch, (x, blocks, x), (of, whole, of), (of, of, whole)),
        "diagonal blocks": (line, diagonal, (x, diagonals, x), (slices, of, slices), (slices, slices, of)),
        "columns": (line, columns, (x, by_8.split(blocks), x, by_8), (whole, of, slices, of), (slices, whole, of)),
        "rows": (line, by_row, (x, by_rows.split(blocks), x, by_rows), (slices, of, whole, of), (whole, slices, of)),
        "nnz": (line, nnz, (x, blocks, x), (of, of, of), (of, of, of)),
        "batch x columns": (
            grid,
            both,
            (x, by_4.split(blocks), x, by_4),
            (P("batch"), P("model"), two, P("model")),
            (two, P("batch"), P("model")),
        ),
    }  # fmt: skip
    found = {}
    for way, (mesh, step, operands, ins, outs) in programs.items():
        program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False))
        stored = by_4.split(blocks).size if way == "batch x columns" else blocks.size
        layer = Layer(rows, size, stored, 4)
        found[way] = in_program(program.lower(*operands).compile().as_text()), collectives(way, layer, 8, model)
    return found


def _in_a_group(rest: str) -> int:
    """How many devices share a collective, by what follows its operands: three ways of XLA to say it."""
    if by_axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):  # mesh['d'=2,'m'=4] {'m'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axes[2]))
    groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", rest)
    assert groups, rest
    return len(groups[1].split(",")) if groups[1] else int(groups[2])


def in_program(hlo: str) -> list[Collective]:
    """The collectives of compiled HLO, over all devices of a group."""
    found = []
    for result, kind, rest in re.findall(r"= (\S+) (all-reduce|all-gather|reduce-scatter|all-to-all)\((.*)", hlo):
        dtype, dims = re.match(r"(\w+)\[([\d,]*)\]", result).groups()
        size = ITEMSIZE[dtype]
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        devices = _in_a_group(rest)
        found.append(Collective(kind, float(size * devices if kind == "reduce-scatter" else size), devices))
    return found


def count_table() -> str:
    def told(some):
        kinds = sorted(f"{c.kind} of {c.nbytes:,.0f} bytes over {c.devices}" for c in some)
        return ", ".join(kinds) or "none"

    lines = ["| way | counted | formula |", "| --- | --- | --- |"]
    lines += [f"| {way} | {told(program)} | {told(formula)} |" for way, (program, formula) in counted().items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="compile programs for 8 CPU devices and count")
    parser.add_argument("--rows", type=int, default=2**20, help="tokens in a step, over all devices")
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--tflops", type=float, default=989.0, help="of one device")
    parser.add_argument("--hbm", type=float, default=3350.0, help="GB/s of one device's memory")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s of one device in one direction")
    parser.add_argument("--infiniband", type=float, default=50.0, help="the same between nodes of 8")
    args = parser.parse_args()
    if args.count:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        print(count_table())
        return
    layer = Layer(args.rows, args.features, round(args.density * args.features**2))
    machine = Machine(args.tflops * 1e12, args.hbm * 1e9, args.nvlink * 1e9, args.infiniband * 1e9)
    print(bytes_table(layer))
    print()
    print(time_table(layer, machine))


if __name__ == "__main__":
    main()
