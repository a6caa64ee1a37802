"""`explain` and `measure`: from a profile that is given, so that nothing is timed but toys, and no timing decides."""

import dataclasses
import json

import pytest
from profiles import PROFILE

import jaxsparse
from jaxsparse.costs import advising, explaining, layers, machine, measuring, model
from jaxsparse.costs.racing import Race

SIZES = (1, 2, 7, 1000, 100_000)
DENSITIES = (0, 1e-12, 0.003, 0.1, 0.5, 1)


@pytest.fixture(autouse=True)
def given_profile(monkeypatch):
    monkeypatch.setattr(machine, "profile", lambda torch=False: PROFILE)


@pytest.mark.parametrize("batch", [1, 65_536])
def test_no_size_and_no_density_fails(batch):
    for in_features in SIZES:
        for out_features in SIZES:
            for density in DENSITIES:
                found = jaxsparse.explain(in_features, out_features, batch, density, train=batch == 1)
                assert [row.layer.kind for row in found.rows] == ["dense", "block_diag", "block_sparse", "sparse"]
                assert all(row.forward > 0 and row.step > 0 for row in found.rows)
                assert all(0 <= value <= 1 for value in found.crossover.values()) and 1 in found.crossover
                assert found.advice.endswith(".") and found.advice in " ".join(str(found).split())
                json.dumps(found.as_dict(), allow_nan=False)


def test_what_is_huge_is_written_out_and_fits_a_terminal():
    text = str(jaxsparse.explain(100_000, 99_991, 65_536, 1e-6, block=200_000))
    assert max(map(len, text.splitlines())) <= 80 and "block-sparse 100000x99991" in text and "e+" not in text


def test_blocks_of_one_entry_cost_what_single_entries_cost():
    found = jaxsparse.explain(97, 4096, 64, 0.1, block=1)
    blocks, entries = found.rows[2:]
    assert (blocks.forward, blocks.step, blocks.layer.temporary_bytes) == (
        entries.forward,
        entries.step,
        entries.layer.temporary_bytes,
    )


def test_the_tables_fit_a_terminal_and_name_every_format():
    text = str(jaxsparse.explain(4096, 4096, 256, 0.1, block=(64, 32), train=True))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("4096 to 4096", "JAX on a processor, 2 threads", "block-sparse 64x32", "67.1 MB", "single entries"):
        assert part in text
    assert "training step is predicted to be faster than dense below" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"density": 1.5}, "density=1.5 is outside"),
        ({"density": float("nan")}, "density=nan is outside"),
        ({"batch": 0}, "batch=0: give a whole number"),
        ({"in_features": 2.5}, "in_features=2.5"),
        ({"dtype": "int8"}, "dtype='int8': there is float32"),
        ({"block": "a"}, "neither an int nor a pair"),
        ({"block": 0}, "at least"),
    ],
)
def test_bad_input_is_refused(options, reason):
    good = {"in_features": 8, "out_features": 8, "batch": 1, "density": 0.5}
    with pytest.raises(ValueError, match=reason):
        jaxsparse.explain(**(good | options))


def test_rates_of_a_busy_machine_are_told(monkeypatch):
    assert "cores busy" not in str(jaxsparse.explain(8, 8, 1, 0.5))
    monkeypatch.setattr(machine, "profile", lambda torch=False: dataclasses.replace(PROFILE, busy=1.5))
    assert "Others kept 1.5 cores busy while the machine's rates" in str(jaxsparse.explain(8, 8, 1, 0.5))
    late = dataclasses.replace(PROFILE, estimated=("bfloat16", "float64"))
    monkeypatch.setattr(machine, "profile", lambda torch=False: late)
    found = jaxsparse.explain(8, 8, 1, 0.5)
    assert "too busy to measure all its rates in time" in str(found) and "bfloat16, float64. Delete" in str(found)
    assert found.as_dict()["rates_estimated"] == ["bfloat16", "float64"]


def test_crossover_is_where_prediction_and_dense_meet():
    found = jaxsparse.explain(2048, 2048, 256, 0.1)
    dense = found.rows[0].layer
    for side, density in found.crossover.items():
        if 0 < density < 1:
            place = dense.shape, dense.batch
            make = lambda d, side=side, place=place: (  # noqa: E731
                layers.sparse(*place, d) if side == 1 else layers.block_sparse(*place, d, side)
            )
            below, above = (model.seconds(make(density * k), PROFILE, "forward") for k in (0.97, 1.04))
            assert below <= model.seconds(dense, PROFILE, "forward") <= above


# ---- advice -----------------------------------------------------------------------------------------------


def rows(dense: float, blocks: float, entries: float, races=None) -> list[explaining.Row]:
    place = (1024, 1024), 8
    made = [layers.dense(*place), layers.block_sparse(*place, 0.1, 32), layers.sparse(*place, 0.1)]
    times = (dense, blocks, entries)
    return [explaining.Row(layer, t, 3 * t, races or {}) for layer, t in zip(made, times, strict=True)]


def test_advice_names_the_best_and_what_else_there_is():
    said = advising.advice(rows(8, 1, 4), {1: 0.3, 32: 0.8}, "forward")
    assert said.startswith(
        "Take block-sparse 32x32. The forward pass is predicted to be 8 times as fast as dense, 1 ms"
    )
    assert said.endswith("If the zeros can't be arranged in blocks, unstructured is predicted to be 2 times as fast.")


def test_advice_prefers_the_freer_of_two_that_are_as_fast():
    said = advising.advice(rows(8, 1, 1.1), {1: 0.3, 32: 0.8}, "forward")
    assert said.startswith("Take unstructured. The forward pass is predicted to be 7.3 times as fast")


def test_advice_says_where_it_begins_to_pay():
    said = advising.advice(rows(1, 4, 8), {1: 0.01, 32: 0.04}, "step")
    assert said.startswith("Stay dense, if it is for speed: block-sparse 32x32")
    assert said.endswith("Blocks of 32 pay below a density of about 0.04.")
    assert "No density would pay" in advising.advice(rows(1, 4, 8), {1: 0.0}, "step")


def test_advice_on_a_close_one_is_to_measure_it():
    assert "Too close to call" in advising.advice(rows(1, 0.98, 2), {32: 0.1}, "forward")
    assert "measure it" in advising.advice(rows(1, 0.98, 2), {32: 0.1}, "forward")
    undecided = {"forward": Race((1.0, 0.9), 6, 10)}
    said = advising.advice(rows(1, 0.1, 0.1, undecided), {32: 0.5}, "forward")
    assert said.startswith("Too close to call") and "measure it" not in said


def test_a_measured_race_outweighs_a_prediction():
    lost = {"forward": Race((1.0, 2.0), 0, 12)}
    assert advising.advice(rows(8, 1, 1, lost), {32: 0.1}, "forward").startswith("Stay dense")


# ---- measuring --------------------------------------------------------------------------------------------


def test_measure_races_a_layer_against_dense():
    found = jaxsparse.measure(32, 16, 4, 0.5, block=8, train=True, seconds=0)
    assert found.layer == layers.block_sparse((32, 16), 4, 0.5, 8)
    assert found.step and all(ms > 0 for race in (found.forward, found.step) for ms in race.milliseconds)
    assert str(found).startswith("block-sparse 8x8, forward: ") and "training step: " in str(found)


def test_explain_measures_every_format(monkeypatch):
    raced = []
    race = Race((2.0, 1.0), 9, 9)
    monkeypatch.setattr(explaining, "contest", lambda layer, modes, *_, **__: raced.append(layer) or {"forward": race})
    found = jaxsparse.explain(64, 64, 8, 0.25, measured=True)
    assert [layer.kind for layer in raced] == ["block_diag", "block_sparse", "sparse"]
    assert found.rows[1].races == {"forward": race} and "Measured, forward, block-diagonal x4: 2 times" in str(found)


def test_measured_layers_compute_in_pytorch_too():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    found = jaxsparse.measure(32, 16, 4, 0.5, kind="block_diag", torch=True, seconds=0, train=True, dtype="float64")
    assert found.layer.stored == 2 and found.step and torch.is_grad_enabled()


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="of memory are free. Give fewer rows or features; jaxsparse.explain"):
        jaxsparse.measure(100_000, 100_000, 65_536, 0.1, block=32)
    with pytest.raises(ValueError, match="more than int32 counts"):
        jaxsparse.measure(100_000, 100_000, 1, 0.5)
    monkeypatch.setattr(measuring, "free_memory", lambda: 10**15)
    with pytest.raises(ValueError, match="a call is predicted to take .* s, and a race needs 9"):
        jaxsparse.measure(100_000, 100_000, 65_536, 0.1, block=32)
    found = jaxsparse.explain(100_000, 100_000, 65_536, 0.1, measured=True)
    assert "not measured: a call is predicted" in found.rows[2].note and "not measured" in str(found)


def test_free_memory_is_some():
    assert 2**20 < measuring.free_memory() < 2**50


@pytest.mark.parametrize("options", [{"kind": "dense"}, {"kind": "sparse", "block": 8}])
def test_a_format_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="there is 'block_diag'|is for kind"):
        jaxsparse.measure(8, 8, 1, 0.5, **options)
