"""Layers, checkpoints and moving patterns on a mesh of eight CPU devices, in processes of their own."""

from pathlib import Path

import devices
import pytest

pytestmark = pytest.mark.slow  # eight devices in processes of their own
HERE = Path(__file__).parent


def run(program: str, optimized: bool = False) -> str:
    done = devices.run(8, str(HERE / program), optimized=optimized)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata_of_initializers_lies_on_values_moments_and_checkpoints():
    assert "checked 4 layers on 8 devices" in run("mesh_layers.py", optimized=True)  # equal bit for bit


def test_moving_patterns_choose_the_same_on_every_device():
    assert "chose the same on 8 devices" in run("mesh_moves.py")
