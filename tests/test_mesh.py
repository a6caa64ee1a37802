"""Layers, checkpoints and moving patterns on a mesh of eight CPU devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # eight devices in processes of their own
HERE = Path(__file__).parent


def run(program: str) -> str:
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, str(HERE / program)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata_of_initializers_lies_on_values_moments_and_checkpoints():
    assert "checked 4 layers on 8 devices" in run("mesh_layers.py")


def test_moving_patterns_choose_the_same_on_every_device():
    assert "chose the same on 8 devices" in run("mesh_moves.py")
