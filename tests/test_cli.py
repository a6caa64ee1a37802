"""The command line, through its entry point: what it prints, its exit codes, what it imports."""

import dataclasses
import json
import subprocess
import sys

import pytest

import cpu_kernels
import jaxsparse
from jaxsparse import _devices, _measured, cli
from jaxsparse._measured import Result, Workload

LIBRARY = pytest.mark.skipif(cpu_kernels.library_file() is None, reason="the CPU kernels were not built")


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


@LIBRARY
def test_devices_says_what_runs_and_what_the_others_lack(capsys):
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
    assert "No measurement of another: XLA is the default on it." in str(found)
    assert found.as_dict()["gpus"][0]["results"][0]["workload"]["rows"] == 4096
