"""The process that runs the steps of `gpu.py`, and the one that starts another when it ends before its time.

A kernel that waits for ever can't be stopped, and one that reads memory which isn't its own leaves its process without
a GPU. Either costs its own step alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp

from benchmarks import _gpu_lost

OVER, LOST = 3, 4  # exit codes: the minutes are over; the GPU is lost to the process
STOPPED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT)


def supervised(out: Path, seconds: float) -> int:
    """Runs the command's steps in processes, one after another, until one of them ends by itself; its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that they end with this one
    until, careful, tried = time.time() + seconds, [], _write_tried(out, [])
    while True:
        command = [sys.executable, *sys.argv, "--until", str(until), *careful]
        code = _ended(subprocess.Popen(command, process_group=0))
        run = json.loads(out.read_text())
        now = run["tried"]
        if code in STOPPED or (code >= 0 and code != LOST) or len(now) == tried:
            return code if code >= 0 else 128 - code
        if time.time() > until:
            return OVER
        # One that was killed may have died of what it built beside the step: that step is tried once more.
        unclear = code < 0 and _gpu_lost.RUNNING not in run["steps"].get(now[-1], {}).get("error", "")
        tried = _write_tried(out, now[:-1] if unclear and not careful else now)
        careful = ["--careful"] if unclear else []


def _write_tried(out: Path, names: list[str]) -> int:
    """Notes which steps are not to be tried again, and gives their number."""
    run = {"steps": {}} | (json.loads(out.read_text()) if out.exists() else {}) | {"tried": names}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(run, indent=1) + "\n")
    return len(names)


def _ended(process: subprocess.Popen) -> int:
    """Its exit code; what it started ends with it."""
    try:
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def given() -> list[str]:
    """The arguments of the command that someone gave."""
    until = sys.argv.index("--until") if "--until" in sys.argv else len(sys.argv)
    return sys.argv[1:until]


class _Doing:
    """What a step does just now, and how that is noted."""

    words = ""
    note: Callable[[str], None] = lambda words: None


def doing(words: str) -> None:
    """Notes what a step does, as a process that dies in it can't say so."""
    _Doing.words = words
    _Doing.note(f"{_gpu_lost.RUNNING} {words}".rstrip())


@contextlib.contextmanager
def ended_after(seconds: float, note: Callable[[str], None] = lambda words: None) -> Iterator[None]:
    """Ends the process if what runs inside takes longer, as nothing else stops a kernel that waits for ever; what is
    noted before says what that was."""
    before = _Doing.words, _Doing.note
    _Doing.words, _Doing.note = "", note
    timer = threading.Timer(seconds, _give_up, (seconds, note))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _Doing.words, _Doing.note = before


def _give_up(seconds: float, note: Callable[[str], None]) -> None:
    words = f"no end after {seconds:g} s {_Doing.words}".rstrip()
    print(f"{words}: another process goes on", flush=True)
    note(words)
    os._exit(LOST)


def answers() -> bool:
    """Whether the GPU of this process still computes."""
    try:
        with ended_after(20):
            return bool(jnp.ones(1)[0] == 1)
    except Exception:
        return False
