"""Processes with several CPU devices, which a test starts as a process has its number of devices for life."""

import os
import subprocess
import sys
from pathlib import Path

import jax

# XLA's older way to make code of what it fuses takes a third of the time. Newer versions have no such option.
OLDER_FUSIONS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
ROOT = Path(__file__).parents[1]


def run(devices: int, *command: str, optimized: bool = False) -> subprocess.CompletedProcess:
    """Runs Python with a number of devices.

    Unless `optimized`, code is made in the way that takes the least time. What XLA makes of a program before, and so
    what devices send to each other, is as ever; how numbers are rounded is not.
    """
    flags, environment = f"--xla_force_host_platform_device_count={devices}", {**os.environ}
    if not optimized:
        flags, environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = f"{flags} {OLDER_FUSIONS}", "1"
    environment["XLA_FLAGS"] = flags
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
