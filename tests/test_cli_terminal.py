"""The command line in a terminal of its own: Ctrl-C."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from jaxsparse import cli

IN_A_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)  # of a session without a terminal this is now the one that Ctrl-C comes from
os.execv(sys.executable, [sys.executable, "-m", "jaxsparse", *sys.argv[1:]])
"""


@pytest.mark.slow  # a process in a terminal of its own
def test_ctrl_c_in_a_terminal_keeps_the_cells_of_bench(tmp_path):
    file, sizes = tmp_path / "run.json", ",".join(map(str, range(8, 400)))
    command = ["bench", "--in", sizes, "--batch", "2", "--density", "0.5", "--seconds", "0", "--only", "JAX dense"]
    ours, its = os.openpty()
    program = [sys.executable, "-c", IN_A_TERMINAL, *command, "--save", str(file)]
    process = subprocess.Popen(program, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    text, pressed = "", False
    with contextlib.suppress(OSError):  # what reading raises once the other side has ended
        while chunk := os.read(ours, 65536):
            text += chunk.decode(errors="replace")
            if file.exists() and not pressed:
                pressed = bool(os.write(ours, b"\x03"))
    os.close(ours)
    assert process.wait() == cli.INTERRUPTED and "Traceback" not in text
    kept = len(json.loads(file.read_text())["cells"])
    assert 1 <= kept < 392 and f"interrupted after {kept} of 392 cells" in text
