"""Processes that a test starts, and that may wait for ever."""

import os
import subprocess
import time
from pathlib import Path

IDLE = 60  # seconds without any time of a processor, which even a busy machine leaves to what works


def run(command, variables) -> subprocess.CompletedProcess:
    """A process to its end, or until it has long done nothing."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process, spent, idle = subprocess.Popen(command, env={**os.environ, **variables}, **pipes), -1, 0
    while idle < IDLE:
        try:
            said = process.communicate(timeout=1)
            return subprocess.CompletedProcess(command, process.returncode, *said)
        except subprocess.TimeoutExpired:
            before, spent = spent, processor_time(process.pid)
            idle = idle + 1 if spent == before else 0
    process.kill()
    return subprocess.CompletedProcess(command, 124, "", f"stopped, as it waited for ever: {process.communicate()[1]}")


def processor_time(process: int) -> int:
    """What a process has used until now, in clock ticks; where the system does not say, it counts as working."""
    file = Path(f"/proc/{process}/stat")
    if not file.exists():
        return time.monotonic_ns()
    return sum(map(int, file.read_text().rpartition(")")[2].split()[11:13]))
