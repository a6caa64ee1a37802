"""The code of a page, run block after block in one namespace, and held to what its comments promise.

Blocks marked `python` run as they are; of those marked `diff` the lines that are left after the change. What a print
says in a comment beside it, `print(x)  # like this`, must be a line of the output.
"""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """The page's blocks of Python."""
    found = re.findall(r"^```(python|diff)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [_after(code) if kind == "diff" else code for kind, code in found]


def run(page: str, code: list[str], namespace: dict) -> str:
    """What the blocks print; the names that they bind are left in the namespace."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in code:
            exec(compile(block, page, "exec"), namespace)
    lines = output.getvalue().splitlines()
    for promised in re.findall(r"^ *print\(.*\)[ \t]+# (.*)", "".join(code), re.MULTILINE):
        assert promised in lines, f"{page} promises {promised!r}"
    return output.getvalue()


def _after(diff: str) -> str:
    """A diff's lines but those that go."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))
