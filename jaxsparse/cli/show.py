"""`jaxsparse show`: the patterns of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    file: Annotated[Path, typer.Argument(help="A file, or the folder of a checkpoint.", metavar="FILE")],
    diff: Annotated[Path | None, typer.Option(help="Another checkpoint: show what moved.", metavar="OTHER")] = None,
    layers: Annotated[str, typer.Option(help="Only layers whose path holds this regular expression.")] = "",
    png: Annotated[Path | None, typer.Option(help="Write the pictures to a file (also .svg, .pdf).")] = None,
    pictures: Annotated[int, typer.Option(help="Draw at most so many layers in the terminal.", min=0)] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the patterns of a checkpoint: densities, empty rows and columns, degrees, pictures, what moved.

    Reads what jaxsparse, torch_bridge and Orbax save, safetensors and folders of Hugging Face, torch.save, SciPy's .npz
    and Matrix Market. Matrices are (in, out). The exit code is 1 if --diff finds a difference.

    \b
    Examples:
      jaxsparse show layer.safetensors
      jaxsparse show runs/pruned-bert --layers 'layer\\.0\\.' --png bert.png
      jaxsparse show step_1000 --diff step_2000 --json
    """
    import re

    from jaxsparse import _findings, _matrices
    from jaxsparse.cli import FOUND, _output, _show

    def read(path):
        found = _matrices.read(path)
        chosen = {name: m for name, m in found.items() if re.search(layers, name)}
        if not chosen:
            raise ValueError(f"no layer of {path} holds {layers!r} in its path; there are {', '.join(found)}.")
        return chosen

    _output.check_expression("--layers", layers)
    _output.check_picture(png)
    before = read(file)
    after = read(diff) if diff else None
    moved = _show.differences(before, after) if after is not None else {}
    if png:
        _show.save(before, after, png)
    if json:
        told = {"file": str(file), "layers": [_findings.as_dict(*item) for item in before.items()]}
        if after is not None:
            told["other"] = str(diff)
            told["moved"] = {name: {**m._asdict(), "differs": m.is_change} for name, m in moved.items()}
        _output.show_json(told)
    elif after is not None:
        _output.show(_show.moves(before, after, moved), *_show.pictures(before, pictures, after, moved))
    else:
        _output.show(_show.table(before), *_show.pictures(before, pictures))
    if any(m.is_change for m in moved.values()):
        raise typer.Exit(FOUND)
