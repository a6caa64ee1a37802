"""The command line in a terminal of its own: Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import types
from typing import Any

import pytest

from jaxsparse import cli
from jaxsparse.bench import running
from jaxsparse.cli import _bench

IN_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # which it is not in a background job of a shell
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


def test_an_interrupt_that_a_callback_lost_ends_bench_after_its_cell(monkeypatch, capsys):
    def run(cells, *_):
        for cell in cells:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            yield cell

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(running, "run", run)
        cells: list[Any] = [types.SimpleNamespace(size_in=8, size_out=8, density=0.5)] * 2
        assert _bench.run_with_progress(cells, 0, "", lambda done: None) == cells[:1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted after 1 of 2 cells" in capsys.readouterr().err
