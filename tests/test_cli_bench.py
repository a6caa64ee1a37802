"""`jaxsparse bench`, through the command line: its grid, its contenders, an interrupt, what it refuses."""

import json

import jax
import pytest

import jaxsparse
from jaxsparse import cli
from jaxsparse.bench import grid, running


@pytest.fixture(autouse=True)
def _piped(monkeypatch):
    """Tables are as wide as where nothing says how wide: who runs the tests may say so (xdist does)."""
    monkeypatch.delenv("COLUMNS", raising=False)


def run(*arguments: str) -> int:
    return cli.main(arguments)


SMALL = ("bench", "--in", "16,32", "--out", "24", "--batch", "4", "--block", "8", "--density", "0.25", "--seconds", "0")


def test_bench_times_every_cell_of_the_grid_and_writes_it_down(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    files = ("--save", str(tmp_path / "run.json"), "--png", str(tmp_path / "run.png"))
    assert run(*SMALL, *files, "--only", "^jaxsparse$|JAX dense", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "run.json").read_text())
    assert [(c["size_in"], c["size_out"], c["block"], c["density"]) for c in found["cells"]] == [
        (16, 24, 8, 0.25),
        (32, 24, 8, 0.25),
    ]
    for cell in found["cells"]:
        assert set(cell["results"]) == {"jaxsparse", "JAX dense"}
        for result in cell["results"].values():
            assert 0 < result["low"] <= result["ms"] <= result["high"] and result["turns"] >= 7 and not result["note"]
        dense, ours = (cell["results"][name] for name in ("JAX dense", "jaxsparse"))
        assert dense["speed"] == 1 and ours["speed"] == pytest.approx(dense["ms"] / ours["ms"])
    assert found["machine"]["cores"] >= 1 and found["versions"]["jax"] == jax.__version__
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
def test_every_contender_of_bench_is_right_or_says_what_stops_it(block, train, monkeypatch):
    monkeypatch.setattr(running, "take_turns", lambda calls, seconds, pause: [[[1e-3] for _ in calls]])
    (cell,) = grid.cells([16], [20], [4], [block], [0.5], "f32", train)
    (measured,) = running.run([cell], 0)
    beside = {"JAX BCOO"} if block == 1 else set()
    assert {"jaxsparse", "JAX dense", "JAX masked"} | beside <= set(measured.results)
    if "torch" in running.frameworks():
        assert {"jaxsparse, torch", "torch dense", "torch masked"} <= set(measured.results)
    for name, result in measured.results.items():
        stopped = name in ("torch BSR", "torch CSR") and result.note.startswith(("RuntimeError", "NotImplementedError"))
        assert stopped or (result.ms == 1.0 and not result.note), (name, result.note)


IN_TORCH = {"jaxsparse, torch", "torch loop of Linear", "torch bmm", "torch einsum", "torch grouped conv1d"}


@pytest.mark.parametrize(("dtype", "train"), [("float32", True), ("f64", False), ("f64", True)])
def test_every_way_to_diagonal_blocks_is_right_in_float64_too(dtype, train, monkeypatch):
    monkeypatch.setattr(running, "take_turns", lambda calls, seconds, pause: [[[call() is None] for call in calls]])
    cells = grid.cells([8], [16], [4], [1], [0.5], dtype, train, diagonal=[4, 8])
    assert [(c.density, c.values_shape) for c in cells] == [(0.25, (4, 2, 4)), (0.125, (8, 1, 2))]
    for measured in running.run(cells, 0):
        assert {"jaxsparse", "JAX dense", "JAX masked", "JAX einsum"} <= set(measured.results)
        assert IN_TORCH <= set(measured.results) or "torch" not in running.frameworks()
        assert not any(result.note for result in measured.results.values()), measured.results


def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    from jaxsparse.bench import in_jax

    monkeypatch.setattr(in_jax, "spmm", lambda x, w, pattern: 2 * jaxsparse.spmm(x, w, pattern))
    assert run(*SMALL, "--only", "^jaxsparse$|JAX dense") == 0
    printed = capsys.readouterr().out
    assert "jaxsparse: a wrong result, relative error 1.0e+00" in printed and "32x24, batch 4, blocks of 8x8" in printed


def test_bench_that_is_interrupted_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    whole, cells = running.take_turns, []

    def interrupted(calls, seconds, pause):
        cells.append(calls)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return whole(calls, seconds, pause=pause)

    monkeypatch.setattr(running, "take_turns", interrupted)
    assert run(*SMALL, "--only", "JAX dense", "--save", str(tmp_path / "run.json")) == cli.INTERRUPTED
    assert len(json.loads((tmp_path / "run.json").read_text())["cells"]) == 1
    assert capsys.readouterr().err == "jaxsparse: interrupted after 1 of 2 cells, which are kept.\n"
    cells.pop()  # so that the next one is the second again
    assert run(*SMALL, "--only", "JAX dense") == cli.INTERRUPTED
    assert capsys.readouterr().err == "jaxsparse: interrupted before the first cell was done.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--in", "ten"], "--in takes whole numbers with commas between, got 'ten'."),
        (["--density", "2"], "density 2.0 is outside 0 to 1"),
        (["--in", "16", "--block", "32"], "a block of 32 is larger than a matrix of 16x16."),
        (["--dtype", "int8"], "dtype 'int8' is not one of float32"),
        (["--batch", "0"], "batch 0 is less than 1."),
        (["--batch", ""], "--batch has no value."),
        (["--in", "30", "--diagonal", "4"], "4 diagonal blocks do not divide a matrix of 30x30."),
        (["--diagonal", ""], "--diagonal has no value."),
        (["--diagonal", "4", "--block", "8"], "leave out --density and --block."),
        (["--save", "nowhere/run.json"], "there is no folder nowhere to write run.json to."),
        (["--only", "["], "--only '[' is no regular expression: unterminated"),
        (
            [*SMALL[1:], "--only", "torch dence"],
            "--only 'torch dence': no contender of these cells is called so; there",
        ),
        (["--png", "nowhere/run.png"], "there is no folder nowhere to write run.png to."),
    ],
)
def test_a_grid_that_is_none_is_refused(arguments, says, capsys):
    assert run("bench", *arguments) == cli.BAD_INPUT
    assert says in capsys.readouterr().err
