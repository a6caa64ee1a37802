"""The command line: `python -m jaxsparse`, and the script `jaxsparse`.

A command is a module of this package with a function of the same name, annotated for typer. At its top it imports typer
and the standard library alone, so that `--help` and bad arguments are answered at once. It prints its result, raises
`typer.Exit` with FOUND or INTERRUPTED where it ended so, and raises ValueError, OSError, ImportError or
NotImplementedError for input that it can't use.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

COMMANDS = ("devices", "explain", "show", "bench")  # in the order of the help
FOUND, BAD_INPUT, INTERRUPTED = 1, 2, 130
_BAD_INPUT = (ValueError, OSError, ImportError, NotImplementedError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for findings and failures, 2 for bad input, 130 if interrupted.

    Args:
      arguments: without the program's name; None for those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        others = [argument for argument in given if argument != "--debug"]
        code = _app()(others or ["--help"], "jaxsparse", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        sys.stdout = None  # or Python tries once more when it ends
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"jaxsparse: {_in_one_line(error)}", file=sys.stderr)
        return _exit_code(error)
    return code if isinstance(code, int) else 0


def console() -> None:
    """`main`, as a script: ends the process."""
    sys.exit(main())


def _app() -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(_options)
    for name in COMMANDS:
        app.command(name)(getattr(importlib.import_module(f"jaxsparse.cli.{name}"), name))
    return app


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; stands anywhere.")] = False,
) -> None:
    """Sparse and block-diagonal layers: what runs here, what a checkpoint holds, and what is fast.

    Every command takes --json and --help, which shows examples. Exit codes: 0; 1 where it
    found or failed something; 2 for input that it can't use; 130 where Ctrl-C ended it.
    """
    del debug  # `main` takes it out, wherever it stands


def _in_one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):  # typer's own: what is wrong with the arguments
        return f"{_one_line(error.format_message())} (--help shows what there is)"  # pyright: ignore
    text = _one_line(str(error)) or type(error).__name__
    if isinstance(error, _BAD_INPUT):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _exit_code(error: Exception) -> int:
    return BAD_INPUT if hasattr(error, "format_message") or isinstance(error, _BAD_INPUT) else FOUND
