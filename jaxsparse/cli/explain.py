"""`jaxsparse explain`: what a layer costs in each format, and whether that pays."""

import sys
from typing import Annotated

import typer


def explain(
    in_features: Annotated[int, typer.Option("--in", help="Features of the input.")],
    out_features: Annotated[int, typer.Option("--out", help="Features of the output.")],
    batch: Annotated[int, typer.Option(help="Rows of the input.")],
    density: Annotated[float, typer.Option(help="The fraction of the weights that is kept, 0 to 1.")],
    block: Annotated[str, typer.Option(help="Blocks of the block-sparse layer: a side, or INxOUT.")] = "32",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 (bf16), float16 (f16) or float64 (f64).")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="Advise on training steps, not on forward passes.")] = False,
    torch: Annotated[bool, typer.Option("--torch", help="In PyTorch, not in JAX.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Race each format against dense as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a layer costs in each format on this machine's CPU, and say which one to take.

    Bytes, operations and predicted times of a dense, a block-diagonal, a block-sparse and an unstructured layer, and
    the density below which each is faster than dense. The first time on a machine, its rates are measured, which takes
    less than ten seconds; then nothing is run, and no memory is taken, unless --measure asks for it.

    \b
    Examples:
      jaxsparse explain --in 4096 --out 4096 --batch 256 --density 0.1
      jaxsparse explain --in 768 --out 3072 --batch 512 --density 0.25 --block 32 --train --torch
      jaxsparse explain --in 2048 --out 2048 --batch 64 --density 0.1 --measure --json | jq .advice
    """
    from jaxsparse.cli._output import show, show_json
    from jaxsparse.costs import layers, machine
    from jaxsparse.costs.explaining import explain as look

    short = {
        "bf16": "bfloat16",
        "f16": "float16",
        "fp16": "float16",
        "f32": "float32",
        "fp32": "float32",
        "f64": "float64",
    }
    dtype, blocks = short.get(dtype, dtype), _block(block)
    layers.check(in_features, out_features, batch, density, dtype)
    if not machine.is_known(torch):
        print("Measuring this machine's rates, once: less than ten seconds.", file=sys.stderr)
    found = look(
        in_features,
        out_features,
        batch,
        density,
        block=blocks,
        dtype=dtype,
        train=train,
        torch=torch,
        measured=measure,
    )
    if json:
        show_json(found.as_dict())
    else:
        show(str(found))


def _block(text: str) -> int | tuple[int, int]:
    """A side, or (i, o)."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise ValueError(f"--block {text}: give a side, as 32, or INxOUT, as 32x64.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
