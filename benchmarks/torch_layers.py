"""Our torch layers beside what one would write in torch, on this CPU: python benchmarks/torch_layers.py.

Every contender of a cell is a torch module, called as a model calls it: after a torch operator on its input. They take
turns in one process on the same numbers (`_measure.py`). A step is forward, backward to the input and the parameters,
and the optimizer. "compiled" is the same under torch.compile. `--only FAMILY` runs one family; what has run is kept in
the results' file, and all of it is in the picture beside that.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import jaxsparse
from benchmarks import _measure, _torch_figure, _torch_modules
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, sparsify

PACKAGES = ("torch", "jax", "sparselab", "transformers", "numpy")
OURS = "ours"
Modules = dict[str, Callable[[], nn.Module]]
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="one family of workloads; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each cell")
    parser.add_argument("--keep-memory", action="store_true", help="jaxsparse.keep_memory(), for all contenders")
    parser.add_argument("--out", default="benchmarks/results/torch_layers.json")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.keep_memory and not jaxsparse.keep_memory():
        raise SystemExit("the C library here takes no wishes about memory")
    out = Path(args.out)
    kept = json.loads(out.read_text()) if args.only and out.exists() else {"families": {}}
    families = kept["families"]
    for name in args.only or FAMILIES:
        cells = [_measured(cell, 0.1 if args.quick else args.seconds) for cell in FAMILIES[name](args.quick)]
        families[name] = {"machine": _measure.machine(PACKAGES), "cells": cells}
        print(_table(name, cells), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"families": families}, indent=1) + "\n")
    print(f"numbers: {out}\npicture: {_torch_figure.draw(families, out.with_suffix('.png'))}")


# ---- the cells: (label, mode, {contender: module}, input, optimizer) -----------------------------------------


class Cell:
    """One workload.

    Attributes:
      label, mode: what it is, and "forward", "backward" (and forward) or "step"; where that begins with "compiled ", of
        compiled modules.
      modules: by contender, what makes its module; all compute the same but for the pattern they were given.
      x: the input, made anew by a torch operator before each call.
      optimizer: of the steps.
    """

    def __init__(self, label: str, mode: str, modules: Modules, x, optimizer: str = "SGD"):
        self.label, self.mode, self.modules, self.x, self.optimizer = label, mode, modules, x, optimizer


def block_diagonal(quick: bool) -> Iterator[Cell]:
    blocks, features = ((1, 4), (16,)) if quick else ((1, 2, 4, 8, 16), (64, 128, 256, 512, 1024, 2048, 4096))
    for n in blocks:
        for f in features:
            if 4 * n * f * f > 3e8:
                continue
            layer = BlockDiagLinear(n * f, n * f, n)
            x = torch.randn(128, n * f)
            modules = {OURS: lambda layer=layer: layer, **_torch_modules.block_diagonal(layer)}
            for mode in ("forward", "step"):
                yield Cell(f"M={n}, F={f}", mode, modules, x)


def sparse(quick: bool) -> Iterator[Cell]:
    size, rows = (64, 8) if quick else (2048, 256)
    kinds = [("unstructured", d, None) for d in (0.05, 0.1, 0.25)]
    kinds += [(f"blocks of {b}", d, b) for b in ((16,) if quick else (16, 32, 64)) for d in (0.1, 0.25)]
    for name, density, block in kinds:
        layer = (
            BlockSparseLinear(size, size, density, block) if block else SparseLinear(size, size, density)
        )  # fmt: skip
        modules = {OURS: lambda layer=layer: layer, **_torch_modules.sparse(layer)}
        for mode in ("forward", "step"):
            yield Cell(f"{name}, {density:.0%}", mode, modules, torch.randn(rows, size), "Adam")


def bfloat16(quick: bool) -> Iterator[Cell]:
    size, rows = (256, 16) if quick else (2048, 256)
    for density, block in ((0.1, None), (0.1, 16), (0.1, 32), (0.25, 32), (0.25, 64), (0.5, 64)):
        layer = BlockSparseLinear(size, size, density, block) if block else SparseLinear(size, size, density)
        layer = layer.bfloat16()
        modules = {OURS: lambda layer=layer: layer, "nn.Linear": lambda layer=layer: layer.to_linear()}
        for mode in ("forward", "step"):
            label = f"blocks of {block}, {density:.0%}" if block else f"unstructured, {density:.0%}"
            yield Cell(f"bfloat16, {label}", mode, modules, torch.randn(rows, size).bfloat16(), "Adam")


def small_batch(quick: bool) -> Iterator[Cell]:
    size = 64 if quick else 4096
    layer = SparseLinear(size, size, 0.1)
    modules = {OURS: lambda: layer, **_torch_modules.sparse(layer)}
    for rows in (1, 8):
        yield Cell(f"{size} x {size}, 10 %, batch {rows}", "forward", modules, torch.randn(rows, size))


def overhead(quick: bool) -> Iterator[Cell]:
    layer = BlockDiagLinear(32, 32, 1)
    modules = {OURS: lambda: layer, **_torch_modules.overhead(layer)}
    yield Cell("32 x 32, batch 8, no optimizer", "backward", modules, torch.randn(8, 32))


def decoder(quick: bool) -> Iterator[Cell]:
    sizes = (64, 128) if quick else (2048, 5632)
    dense = _torch_modules.GatedMLP(*sizes)
    modules: Modules = {"torch dense": lambda: dense}
    for name, rule in {
        "10 % of the entries": {"kind": "sparse", "density": 0.1},
        "25 % in blocks of 32": {"kind": "block_sparse", "density": 0.25, "block": 32},
    }.items():
        model = copy.deepcopy(dense)
        sparsify(model, [(".*", rule)])
        modules[f"{OURS}, {name}"] = lambda model=model: model
    for rows in (1, 8):
        yield Cell(f"gated MLP {sizes[0]} to {sizes[1]}, batch {rows}", "forward", modules, torch.randn(rows, sizes[0]))


def roberta(quick: bool) -> Iterator[Cell]:
    dense = _torch_modules.roberta(quick)
    modules: Modules = {"torch dense": lambda: dense}
    for density in (0.5, 0.25, 0.1):
        model = copy.deepcopy(dense)
        sparsify(model, _torch_modules.roberta_rules(density))
        modules[f"{OURS}, density {density}"] = lambda model=model: model
    tokens = torch.randint(5, 250, (4, 128))
    yield Cell("encoder, 4 x 128 tokens", "forward", modules, tokens)
    yield Cell("encoder, 4 x 128 tokens", "step", modules, tokens, "AdamW")


def compiled(quick: bool) -> Iterator[Cell]:
    size, rows = (256, 8) if quick else (2048, 256)
    diagonal = BlockDiagLinear(size, size, 16)
    named: dict[str, Modules] = {"block-diagonal, M=16, F=128": {OURS: lambda: diagonal}}
    named["block-diagonal, M=16, F=128"] |= _torch_modules.block_diagonal(diagonal)
    for label, layer in {
        "unstructured, 10%": SparseLinear(size, size, 0.1),
        "blocks of 32, 10%": BlockSparseLinear(size, size, 0.1, 32),
    }.items():
        named[label] = {OURS: lambda layer=layer: layer, "nn.Linear": layer.to_linear}
    for label, modules in named.items():
        fastest = {name: make for name, make in modules.items() if name in (OURS, "nn.Linear", "baddbmm")}
        for mode in ("forward", "step"):
            yield Cell(label, f"compiled {mode}", fastest, torch.randn(rows, size), "Adam")


FAMILIES: dict[str, Callable[[bool], Iterator[Cell]]] = {
    "overhead": overhead,
    "sparse": sparse,
    "bfloat16": bfloat16,
    "small batch": small_batch,
    "decoder": decoder,
    "roberta": roberta,
    "compiled": compiled,
    "block-diagonal": block_diagonal,
}


# ---- measuring -------------------------------------------------------------------------------------------------


def _measured(cell: Cell, seconds: float) -> dict:
    builders = {name: lambda make=make: _call(make(), cell) for name, make in cell.modules.items()}
    with _measure.Load() as load:
        results = _measure.measure(builders, np.ones(1), seconds, longest=5.0, keep=tuple(builders))
    numbers = {n: {"ms": r.ms, "rounds": [round(t, 5) for t in r.rounds], "note": r.note} for n, r in results.items()}
    return {"label": cell.label, "mode": cell.mode, "load_of_others": load.of_others, "results": numbers}


def _call(module: nn.Module, cell: Cell) -> Callable[[], np.ndarray]:
    """What is timed. It returns ones: that contenders agree is checked where they are made."""
    done, x = np.ones(1), cell.x

    def ready() -> torch.Tensor:
        return x + 1 if x.is_floating_point() else x  # as the layer before would leave it

    mode = cell.mode.removeprefix("compiled ")
    call: Callable = module
    if mode != cell.mode:
        torch.compiler.reset()
        call = torch.compile(module, fullgraph=True)
    if mode == "forward":

        def forward():
            with torch.no_grad():
                call(ready())
            return done

        return forward
    cotangent = torch.randn_like(_output(call(ready())))
    optimizer = OPTIMIZERS[cell.optimizer](module.parameters(), lr=1e-4) if mode == "step" else None

    def step():
        if optimizer:
            optimizer.zero_grad()
        given = ready()
        given = given.requires_grad_() if given.is_floating_point() else given
        _output(call(given)).backward(cotangent)
        if optimizer:
            optimizer.step()
        return done

    return step


def _output(y) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else y[0]


def _table(name: str, cells: list[dict]) -> str:
    lines = [f"\n== {name}: ms a call, median of the rounds; `others`: cores busy with other processes"]
    ratios: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        results = {n: r["ms"] for n, r in cell["results"].items()}
        text = "  ".join(f"{n} {'-' if ms is None else format(ms, '.3g')}" for n, ms in results.items())
        lines.append(f"{cell['label']:32s} {cell['mode']:8s} {text}  others {cell['load_of_others']}")
        others = [ms for n, ms in results.items() if not n.startswith(OURS) and ms is not None]
        for n in (n for n in results if n.startswith(OURS) and results[n] and others):
            ratio = min(others) / results[n]
            ratios.setdefault((n, cell["mode"]), []).append(ratio)
            lines[-1] += f"  [{n}: {ratio:.2f}x of the best]"
        lines += [f"    {n}: {r['note']}" for n, r in cell["results"].items() if r["note"]]
    for (contender, mode), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(
            f"{contender}, {mode}: geometric mean {mean:.2f}x of {len(values)} cells, worst {min(values):.2f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
