"""The document on scaling says what its script says, and the formula says what XLA compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # `benchmarks` is no part of the installed package
    from benchmarks import scaling

    return scaling


def told(*options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_tables_are_those_of_the_formula():
    tables = told().split("\n\n")
    assert len(tables) == 2 and all(table in DOCUMENT for table in tables)


@pytest.mark.slow
def test_programs_hold_the_collectives_of_the_formula():
    table = told("--count")
    assert table in DOCUMENT
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    assert len(rows) == 6
    for way, counted, formula in rows:
        assert counted == formula, way


def test_other_rates_move_the_limit(scaling):
    layer = scaling.Layer(2**20, 8192, 6_710_886)
    limits = [
        scaling.first_too_many("batch", layer, scaling.Machine(989e12, 3.35e12, 450e9, rate))
        for rate in (5e9, 50e9, 500e9)
    ]
    assert limits == ["16", "128", "1,024"]


def test_collectives_are_read_off_compiled_text(scaling):
    hlo = """
      %a = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
      %b = bf16[16]{0} reduce-scatter(%y), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
      %c = f32[4]{0} all-gather(%z), channel_id=3, replica_groups=mesh['d'=2,'m'=4] {'m'}, dimensions={0}
    """
    assert scaling.in_program(hlo) == [("all-reduce", 128.0, 2), ("reduce-scatter", 256.0, 8), ("all-gather", 16.0, 4)]
