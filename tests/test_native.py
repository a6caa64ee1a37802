"""The kernels' own test program, with no Python around it: under sanitizers, and on Arm under an emulator."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "cpu_kernels"
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
pytestmark = pytest.mark.slow  # three builds with sanitizers, one run under an emulator
# name: (options of CMake, the emulator)
BUILDS = {
    # Every instruction set: where a vector ends beyond an array depends on its width. Of undefined behaviour the
    # portable one.
    "address and undefined": (["-DJAXSPARSE_SANITIZE=address,undefined"], []),
    # The wide ones.
    "undefined, float32": (["-DJAXSPARSE_SANITIZE=undefined", "-DJAXSPARSE_FLOAT32_ALONE=ON"], []),
    # One instruction set: how work is shared out among threads is the same code for all of them. An unknown processor
    # has none but the portable one.
    "thread": (
        ["-DJAXSPARSE_SANITIZE=thread", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=unknown"],
        [],
    ),
    "arm": (
        [
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={ARM[0]}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ],
        [ARM[1]],
    ),
}


def missing(name: str) -> str | None:
    """What this machine lacks for a build."""
    tools = ["cmake", *(ARM if name == "arm" else [])]
    absent = [tool for tool in tools if not shutil.which(tool)]
    if name != "arm" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        absent.append("a C++ compiler")
    return f"{name}: {', '.join(absent)} not found" if absent else None


@pytest.mark.skipif(not shutil.which("clang++"), reason="there is no clang++")
@pytest.mark.parametrize("file", ["calls", "dispatch", "isa", "n_m", "parallel"])
def test_clang_takes_the_sources(file):
    """GCC builds the library here; an install may find clang alone."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", *["-DJAXSPARSE_X86"] * x86, "-DJAXSPARSE_ISA=portable"]
    command = ["clang++", *flags, str(SOURCE / f"{file}.cc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", BUILDS)
def test_the_native_tests_pass(name, tmp_path):
    if reason := missing(name):
        pytest.skip(reason)
    options, emulator = BUILDS[name]
    configure = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), "-DJAXSPARSE_CPU_TESTS=ON", *options]
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    size = ["quick"] if emulator else []
    done = subprocess.run([*emulator, tmp_path / "test_kernels", *size], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "portable: 0 failures" in done.stdout
    print(done.stdout)
