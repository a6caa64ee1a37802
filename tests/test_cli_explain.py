"""`jaxsparse explain`, through the entry point."""

import json

import pytest

from jaxsparse import cli
from jaxsparse.costs import explaining, machine
from jaxsparse.costs.machine import Profile
from jaxsparse.costs.racing import Race

LAYER = ("explain", "--in", "4096", "--out", "4096", "--batch", "256", "--density", "0.1")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path))
    rates = dict.fromkeys(("float32", "bfloat16", "float16", "float64"), 2e11)
    calls = {"forward": 4e-5, "gradients": 8e-5, "step": 1e-4}
    found = Profile(
        "jax", "a processor", 2, rates, {"blocks": 1e11, "entries": 5e10}, {2**20: 5e10, 2**26: 2e10}, calls
    )
    machine._known.cache_clear()
    machine.write(machine.cache_file("jax"), found)
    yield
    machine._known.cache_clear()


def test_tables_and_advice_fit_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(LAYER) == 0
    printed, told = capsys.readouterr()
    assert max(map(len, printed.splitlines())) <= 80 and not told
    for part in (
        "4096 to 4096 features, 256 rows, float32",
        "block-sparse 32x32",
        "unstructured",
        "Take block-diagonal",
    ):
        assert part in printed


def test_json_holds_the_numbers_and_the_measured_ones_where_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(explaining, "contest", lambda *_, **__: {"step": Race((2.0, 1.0), 9, 9)})
    assert cli.main([*LAYER, "--json", "--train", "--measure", "--block", "64x32", "--dtype", "bf16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["in_features"], found["dtype"], found["framework"]) == (4096, "bfloat16", "jax")
    dense, diagonal, blocks, entries = found["formats"]
    assert dense["weight_bytes"] == 2 * 4096**2 and dense["measured"] == {} and blocks["block"] == [64, 32]
    assert entries["measured"]["step"] == {"dense_ms": 2.0, "ms": 1.0, "faster": True}
    assert diagonal["predicted_ms"]["forward"] > 0 and found["crossover"]["32"] > found["crossover"]["1"]
    assert found["crossover_of"] == "step" and "measured to be 2 times as fast" in found["advice"]


def test_the_first_time_it_says_what_it_waits_for(capsys, monkeypatch):
    kept = machine.profile()
    machine.cache_file("jax").unlink()
    machine._known.cache_clear()
    monkeypatch.setattr(machine, "measure", lambda framework: kept)
    assert cli.main(LAYER) == 0
    assert capsys.readouterr().err == "Measuring this machine's rates, once: less than ten seconds.\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--density", "2"), "density=2.0 is outside [0, 1]"),
        (("--block", "a"), "--block a: give a side, as 32, or INxOUT"),
        (("--block", "8x8x8"), "--block 8x8x8"),
        (("--dtype", "int8"), "dtype='int8': there is float32"),
        (("--batch", "0"), "batch=0: give a whole number"),
    ],
)
def test_bad_input_is_one_line(capsys, options, reason):
    assert cli.main([*LAYER, *options]) == cli.BAD_INPUT
    printed, told = capsys.readouterr()
    assert reason in told and told.count("\n") == 1 and not printed
