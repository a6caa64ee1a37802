"""What holds for all tests: which ones are slow, how XLA compiles, what becomes of its programs; shared fixtures."""

import ctypes
import gc
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from devices import OLDER_FUSIONS

STATUS = Path("/proc/self/statm")  # on Linux
MORE = 200 * 2**20
limit = 1000 * 2**20  # bytes
# XLA's optimizer takes most of the time of a test at toy sizes. It never touches the kernels in C++, and the dense
# product, which sets every tolerance, is compiled as the product beside it. Processes that a test starts optimize, and
# .ci/run has the products tested with this setting too.
UNOPTIMIZED = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
jax.config.update("jax_disable_most_optimizations", UNOPTIMIZED)
# JAX's persistent cache, for the length of one run: workers, and processes that tests start, compile a program once.
SHARED = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_sessionstart(session):
    """Lets XLA read its options, which the processes that tests start are to be without."""
    runs_no_tests = session.config.getoption("dist", "no") != "no"  # but starts workers that do
    if runs_no_tests or not UNOPTIMIZED or not OLDER_FUSIONS:
        return
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{given or ''} {OLDER_FUSIONS}"
    jax.jit(lambda: 0)()
    os.environ.pop("XLA_FLAGS") if given is None else os.environ.update(XLA_FLAGS=given)


def pytest_configure(config):
    """Makes the cache of compiled programs; workers and other processes find it in their environment."""
    # Who reads an entry that another process is writing compiles for itself.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="jaxsparse-programs-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in {"jax_compilation_cache_dir": folder, **SHARED}.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")
    parser.addoption("--each", action="store_true", help="run every test, but of sweeps only what is not slow")


def pytest_collection_modifyitems(config, items):
    """Leaves the slow tests out, unless all are wanted or a file was named."""
    named = any(".py" in argument for argument in config.args)
    if config.option.all or (named and not config.option.each) or config.option.markexpr:
        return
    quick = [item for item in items if not item.get_closest_marker("slow")]
    if config.option.each:
        swept = {function_of(item) for item in quick}
        quick = [item for item in items if not item.get_closest_marker("slow") or function_of(item) not in swept]
    kept = set(quick)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = quick


def function_of(item) -> str:
    """The test without its parameters."""
    return item.nodeid.partition("[")[0]


@pytest.fixture
def optimized():
    """XLA's whole optimizer, for what is asked of a compiled program: its memory, its operations, its rounding."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", UNOPTIMIZED)


def pytest_runtest_logfinish():
    """Drops the compiled programs once they take much memory, so that two workers fit a laptop."""
    global limit
    if not STATUS.exists() or resident() < limit:
        return
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    limit = max(limit, resident() + MORE)


def resident() -> int:
    """Bytes that this process holds."""
    return int(STATUS.read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def strict():
    """Strict dtype promotion: an op that mixes dtypes by accident raises."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield
