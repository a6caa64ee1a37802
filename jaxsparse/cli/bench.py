"""`jaxsparse bench`: what is fast on this machine, for layers of one's own sizes."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    size_in: Annotated[str, typer.Option("--in", help="Input features; several with commas.")] = "1024",
    size_out: Annotated[str, typer.Option("--out", help="Output features; the inputs' where left out.")] = "",
    batch: Annotated[str, typer.Option(help="Rows of the input.")] = "128",
    density: Annotated[
        str | None, typer.Option(help="Shares of the weights that are kept; 0.01,0.05,0.1,0.2 where left out.")
    ] = None,
    block: Annotated[str | None, typer.Option(help="Sides of the blocks; 1, single entries, where left out.")] = None,
    diagonal: Annotated[str | None, typer.Option(help="Numbers of diagonal blocks, in place of these two.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 (bf16), float16 (f16) or float64 (f64).")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="Time training steps: forward, both gradients, SGD.")] = False,
    seconds: Annotated[float, typer.Option(help="For the turns of each cell.", min=0)] = 2.0,
    only: Annotated[str, typer.Option(help="Contenders whose name holds this regular expression.")] = "",
    out: Annotated[Path | None, typer.Option("--save", help="Write JSON to a file, after every cell.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture (also .svg, .pdf).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time layers of your sizes: ours, dense ones, and what else is installed.

    Contenders take turns in one process, on the same numbers, and each result is checked first. Options take several
    values with commas, and every combination is a cell. Speeds are relative to the faster dense product. Ctrl-C ends
    it early and keeps what it has; the exit code is then 130.

    \b
    Examples:
      jaxsparse bench --in 2048 --batch 256 --density 0.05,0.1,0.3 --train
      jaxsparse bench --in 768 --out 3072 --block 1,32 --dtype bf16 --png speed.png
      jaxsparse bench --in 1024 --diagonal 2,4,16 --train
      jaxsparse bench --in 512,4096 --only 'jaxsparse|dense' --save run.json --json
    """
    from jaxsparse.bench import grid, running
    from jaxsparse.cli import INTERRUPTED, _bench, _output

    if diagonal is not None and (density or block):
        raise ValueError("--diagonal says where all weights are: leave out --density and --block.")
    cells = grid.cells(
        _bench.whole("--in", size_in),
        _bench.whole("--out", size_out),
        _bench.whole("--batch", batch),
        _bench.whole("--block", "1" if block is None else block),
        _bench.shares("--density", "0.01,0.05,0.1,0.2" if density is None else density),
        dtype,
        train,
        _bench.whole("--diagonal", diagonal) if diagonal is not None else None,
    )
    _output.check_expression("--only", only)
    _output.check_folder(out)
    _output.check_picture(png)
    about = _bench.about()
    measured = _bench.run_with_progress(cells, seconds, only, lambda done: out and running.save(out, done, about))
    if measured and not any(m.results for m in measured):
        raise ValueError(f"--only {only!r}: no contender of these cells is called so; there are {_bench.NAMES}.")
    if png and measured:
        _bench.draw(measured, about, png)
    if json:
        _output.show_json(running.as_dict(measured, about))
    else:
        _output.show(*_bench.tables(measured, about))
    if len(measured) < len(cells):
        raise typer.Exit(INTERRUPTED)
