"""`jaxsparse devices`: what runs here."""

from typing import Annotated

import typer


def devices(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show which back ends run here, and what the others lack.

    Also: versions, instruction set and origin of the compiled kernels, the way that torch's layers take, and what was
    measured on the GPUs of this machine. The exit code is 1 if the compiled CPU kernels can't be used.

    \b
    Examples:
      jaxsparse devices
      jaxsparse devices --json | jq '.backends[] | select(.runs) | .name'
    """
    from jaxsparse._devices import devices as look
    from jaxsparse.cli._output import show, show_json

    found = look()
    if json:
        show_json(found.as_dict())
    else:
        show(found)
    if not next(b.runs for b in found.backends if b.name == "cpu"):
        raise typer.Exit(1)
