"""The command line, through its entry point: what it prints, its exit codes, what it imports."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
from flax import nnx

import cpu_kernels
import jaxsparse
from jaxsparse import BlockPattern, _devices, _matrices, _measured, checkpoint, cli
from jaxsparse._measured import Result, Workload

LIBRARY = pytest.mark.skipif(cpu_kernels.library_file() is None, reason="the CPU kernels were not built")

CPU = _devices.BackEnd("cpu", "C++ kernels", True, ("float32",), None, None)
NO_LIBRARY = _devices.Library(None, None, None)


@pytest.fixture(autouse=True)
def _piped(monkeypatch):
    """Tables are as wide as where nothing says how wide: who runs the tests may say so (xdist does)."""
    monkeypatch.delenv("COLUMNS", raising=False)


def run(*arguments: str) -> int:
    return cli.main(arguments)


def told(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_help_imports_no_jax_and_bad_input_shows_no_traceback():
    code = """
import sys
from jaxsparse import cli
assert cli.main(["--help"]) == 0
assert all(cli.main([name, "--help"]) == 0 for name in cli.COMMANDS)
assert cli.main(["devises"]) == 2
print(sorted({"jax", "numpy", "flax", "torch", "matplotlib", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\n[]\n") and "jaxsparse devices --json" in done.stdout
    assert done.stderr.splitlines() == [
        "jaxsparse: No such command 'devises'. Did you mean 'devices'? (--help shows what there is)"
    ]


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "jaxsparse", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: jaxsparse [OPTIONS] COMMAND")


def test_an_unexpected_error_is_one_line_and_debug_shows_all(monkeypatch, capsys):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("jaxsparse._devices.devices", broken)
    assert run("devices") == cli.FOUND
    assert capsys.readouterr().err == "jaxsparse: RuntimeError: two lines (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="two"):
        run("devices", "--debug")


def test_a_caller_in_python_gets_the_text(monkeypatch):
    monkeypatch.setattr("jaxsparse._devices.devices", lambda: _devices.Devices({}, (), (CPU,), NO_LIBRARY, (), None))
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run("devices") == 0
    assert "C++ kernels" in text.getvalue()


def test_an_interrupt_and_a_reader_that_left_are_no_errors(monkeypatch, capsys, tmp_path):
    for stopped, code in ((KeyboardInterrupt, cli.INTERRUPTED), (BrokenPipeError(32, "Broken pipe"), None)):

        def stop(stopped=stopped):
            raise stopped

        with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
            patched.setattr("jaxsparse._devices.devices", stop)
            assert run("devices") == code
    assert capsys.readouterr().err == ""


@LIBRARY
def test_devices_says_what_runs_and_what_the_others_lack(monkeypatch, capsys):
    assert run("devices", "--json") == 0
    found = told(capsys)
    by_name = {b["name"]: b for b in found["backends"]}
    assert list(by_name) == ["xla", "cpu", "mosaic", "triton", "interpret"]
    assert by_name["cpu"]["runs"] and by_name["cpu"]["reason"] is None
    assert by_name["mosaic"]["dtypes"] == ["bfloat16", "float16"]
    for b in found["backends"]:
        assert b["runs"] or (b["reason"] and b["remedy"])
    assert found["library"]["isa"] == cpu_kernels.isa() and found["library"]["file"] == str(cpu_kernels.library_file())
    assert found["versions"]["jaxsparse"] and found == json.loads(json.dumps(jaxsparse.devices().as_dict()))
    monkeypatch.setenv("COLUMNS", "80")
    assert run("devices") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, version in found["versions"].items():  # in one line, however narrow the terminal is
        assert any(f"{name} {version or 'not installed'}" in line for line in lines), name


def test_devices_without_the_library_says_what_to_do_and_fails(monkeypatch, capsys):
    reason = "libjaxsparse_cpu.so was not built. Install a C++17 compiler (g++) and reinstall jaxsparse."
    monkeypatch.setattr(cpu_kernels, "why_not_loaded", lambda: reason)
    monkeypatch.setattr(cpu_kernels, "library_file", lambda: None)
    assert run("devices") == cli.FOUND
    printed = capsys.readouterr().out
    assert "why not: libjaxsparse_cpu.so was not built" in printed and "CPU kernels  not built" in printed
    assert "remedy:  Install a C++17 compiler (g++) and reinstall jaxsparse." in printed


def test_devices_shows_what_was_measured_on_the_gpu_here(monkeypatch, tmp_path):
    monkeypatch.setattr(_measured, "TABLE", tmp_path / "measured.json")
    won = Result(Workload("spmm", "bfloat16", (64, 64), 4096, 0.1), "mosaic", 3.25, "run 7")
    _measured.write("NVIDIA H100", [won])
    gpus = [_devices.Gpu(kind, _measured.results(kind)) for kind in ("NVIDIA H100", "another")]
    _measured._results.cache_clear()
    found = dataclasses.replace(jaxsparse.devices(), gpus=tuple(gpus))
    assert "Measured on NVIDIA H100" in str(found) and "3.25" in str(found)
    assert "the nearest of its product and dtype, up to 4 doublings" in " ".join(str(found).split())
    assert "No measurement of another: XLA is the default on it." in str(found)
    assert found.as_dict()["gpus"][0]["results"][0]["workload"]["rows"] == 4096


# ---- show -------------------------------------------------------------------------------------------------

MASK = np.tri(6, 8, 2, bool) & (np.arange(8) != 4)  # an empty output, and 1 to 7 inputs of the others


def saved(path, mask=MASK, scale=1.0, block=(1, 1)):
    pattern = BlockPattern.from_mask(mask, block)
    checkpoint.save(path, {"first": {"kernel": scale * np.ones(pattern.values_shape, np.float32), "pattern": pattern}})
    return str(path)


def test_show_tells_densities_empty_lines_and_degrees(tmp_path, capsys):
    assert run("show", saved(tmp_path / "a"), "--json") == 0
    (layer,) = told(capsys)["layers"]
    assert (layer["path"], layer["shape"], layer["block"], layer["nnzb"]) == ("first", [6, 8], [1, 1], MASK.sum())
    outputs, inputs = layer["degrees"]["outputs"], layer["degrees"]["inputs"]
    assert (outputs["empty"], outputs["least"], outputs["most"]) == (1, 0, MASK.sum(0).max())
    assert (inputs["empty"], inputs["median"]) == (0, np.median(MASK.sum(1)))
    assert sum(outputs["counts"]) == 8 and sum(inputs["counts"]) == 6


def test_show_draws_the_pattern_in_characters_and_in_a_file(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert run("show", saved(tmp_path / "a"), "--png", str(tmp_path / "a.png")) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    drawn = ["│" + "".join("██" if stored else "  " for stored in row) + "│" for row in MASK]
    assert all(line in lines for line in drawn)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_show_keep_their_numbers_in_eighty_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    pattern = BlockPattern.random(jax.random.key(0), (3072, 768), density=0.05)
    tree = {"encoder.layer_11.attention.output.dense": {"kernel": np.ones(pattern.values_shape), "pattern": pattern}}
    checkpoint.save(tmp_path / "a", tree)
    for more in ((), ("--diff", str(tmp_path / "a"))):
        assert run("show", str(tmp_path / "a"), "--pictures", "0", *more) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
        assert all(text in printed for text in (["117,965"] if more else ["3072x768", "153/154/154", "/"])), printed


def test_a_picture_that_can_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert run("show", saved(tmp_path / "a"), "--png", str(tmp_path / "a.text")) == cli.BAD_INPUT
    assert "matplotlib writes files that end in ." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["show", saved(tmp_path / "a")], ["bench"]):
        assert run(*command, "--png", str(tmp_path / "a.png")) == cli.BAD_INPUT
        assert "--png needs matplotlib: pip install 'jaxsparse[plots]'." in capsys.readouterr().err


def test_show_diff_counts_what_moved_and_says_so_by_its_exit_code(tmp_path, capsys):
    a, same = saved(tmp_path / "a"), saved(tmp_path / "same")
    other = MASK.copy()
    other[0, 0], other[0, 7], other[0, 6] = False, True, True
    b = saved(tmp_path / "b", other, scale=1.5)
    assert run("show", a, "--diff", same) == 0
    capsys.readouterr()
    assert run("show", a, "--diff", b, "--json") == cli.FOUND
    moved = told(capsys)["moved"]["first"]
    assert (moved["kept"], moved["gone"], moved["grown"]) == (MASK.sum() - 1, 1, 2)
    assert moved["change"] == pytest.approx(0.5)
    assert run("show", a, "--diff", saved(tmp_path / "c", MASK[:, :6])) == cli.FOUND
    assert "6x8 became 6x6" in capsys.readouterr().out
    assert run("show", a, "--diff", saved(tmp_path / "d", block=2), "--png", str(tmp_path / "d.png")) == cli.FOUND
    assert "blocks of 1x1 became 2x2" in capsys.readouterr().out


def test_of_two_checkpoints_what_moved_is_drawn_first(tmp_path, capsys):
    patterns = {"one": BlockPattern.from_mask(MASK), "other": BlockPattern.from_mask(MASK.T[:6, :6])}
    for name, second in (("before", "one"), ("after", "other")):
        layers = {"same": patterns["one"], "moved": patterns[second]}
        tree = {key: {"kernel": np.ones(p.values_shape, np.float32), "pattern": p} for key, p in layers.items()}
        checkpoint.save(tmp_path / name, tree)
    assert run("show", str(tmp_path / "before"), "--diff", str(tmp_path / "after"), "--pictures", "1") == cli.FOUND
    printed = capsys.readouterr().out
    assert "moved, then" in printed and "same, then" not in printed


def test_what_show_cannot_read_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "text").write_text("nothing")
    np.save(tmp_path / "array.npy", np.ones(3))
    checkpoint.save(tmp_path / "empty", {"bias": np.ones(3)})
    for name, says in {"none": "no such file", "text": "can't be read", "empty": "holds no weight matrix"}.items():
        assert run("show", str(tmp_path / name)) == cli.BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("jaxsparse: ") and says in line
    assert run("show", saved(tmp_path / "a"), "--layers", "second") == cli.BAD_INPUT
    assert "there are first" in capsys.readouterr().err
    assert run("show", str(tmp_path / "a"), "--layers", "(") == cli.BAD_INPUT
    assert "--layers '(' is no regular expression: missing )" in capsys.readouterr().err
    assert run("show") == cli.BAD_INPUT and "Missing argument 'FILE'" in capsys.readouterr().err


def stored(found: dict) -> list:
    return [(name, m.stored, m.shape, m.pattern and m.pattern.nnzb) for name, m in found.items()]


LAYERS = [("layers.0", "sparse", (8, 6), 12), ("layers.1", "blocks", (6, 7), 6), ("layers.2", "dense", (7, 3), None)]


def net() -> nnx.Module:
    rngs = nnx.Rngs(0)
    layers = (
        jaxsparse.SparseLinear(8, 6, density=0.25, rngs=rngs),
        jaxsparse.BlockSparseLinear(6, 7, density=0.5, block=2, rngs=rngs),
    )
    return nnx.Sequential(*layers, nnx.Linear(7, 3, rngs=rngs))


def test_matrices_are_found_in_an_nnx_state_and_in_what_orbax_saved_of_it(tmp_path):
    state = nnx.state(net())
    checkpoint.save(tmp_path / "ours", state)
    assert stored(_matrices.read(tmp_path / "ours")) == LAYERS
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(20, args=ocp.args.StandardSave(nnx.to_pure_dict(state)))
    (tmp_path / "steps" / "3").mkdir()  # an earlier one, which is not read
    found = _matrices.read(tmp_path / "steps")
    assert stored(found) == LAYERS
    np.testing.assert_array_equal(found["layers.0"].values, state["layers"][0]["kernel"][...])


def test_matrices_are_found_in_linens_collections_and_in_stacks(tmp_path):
    model = jaxsparse.SparseDense(6, density=0.25)
    variables = jax.vmap(model.init, (0, None))(jax.random.split(jax.random.key(0), 2), np.ones((1, 8)))
    opt_state = {"mu": {"kernel": np.ones((3, 3))}}
    checkpoint.save(tmp_path / "file", {"params": {"a": variables["params"]}, "pattern": {"a": variables["pattern"]}})
    assert stored(_matrices.read(tmp_path / "file")) == [("a.0", "sparse", (8, 6), 12), ("a.1", "sparse", (8, 6), 12)]
    checkpoint.save(tmp_path / "moments", {"kernel": np.eye(3), "opt_state": opt_state})
    assert stored(_matrices.read(tmp_path / "moments")) == [("kernel", "dense", (3, 3), 3)]


def test_block_diagonal_weights_are_known_by_their_biases_and_convolutions_are_none(tmp_path):
    layer = jaxsparse.BlockDiagLinear(8, 12, 4, rngs=nnx.Rngs(0))
    convolutions = nnx.Conv(3, 5, (2,), rngs=nnx.Rngs(0)), nnx.Conv(3, 5, (1,), rngs=nnx.Rngs(0))
    in_torch = {"weight": np.ones((5, 3, 1)), "bias": np.ones(5)}
    tree = [nnx.to_pure_dict(nnx.state(m)) for m in (layer, *convolutions)]
    checkpoint.save(tmp_path / "file", {"layers": [*tree, in_torch]})
    (found,) = _matrices.read(tmp_path / "file").items()
    assert stored(dict([found])) == [("layers.0", "diagonal", (8, 12), 4)]
    np.testing.assert_array_equal(found[1].pattern.to_dense(found[1].values)[2:4, 3:6], layer.kernel[...][1])


def test_matrices_are_found_in_files_of_other_libraries(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import torch_bridge

    table = torch.nn.Embedding(9, 8)
    layers = torch_bridge.SparseLinear(8, 6, 0.25), torch_bridge.BlockSparseLinear(6, 7, 0.5, block=2)
    model = torch.nn.ModuleDict(
        {"word_embeddings": table, "layers": torch.nn.Sequential(*layers, torch.nn.Linear(7, 3))}
    )
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert stored(_matrices.read(tmp_path / "model.pt")) == LAYERS
    scipy.sparse.save_npz(tmp_path / "m.npz", scipy.sparse.random_array((5, 4), density=0.5, format="csr"))
    assert stored(_matrices.read(tmp_path / "m.npz")) == [("matrix", "sparse", (5, 4), 10)]
