"""What a process keeps of the memory that its arrays leave."""

import resource
import subprocess
import sys

import pytest

import jaxsparse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")

# Pages that are new in five arrays of so many bytes, one after the other.
NEW_PAGES = """
import resource, sys
import numpy as np
import jaxsparse

def new_pages(size):
    np.ones(size, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(size, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size = 40 << 20
first = new_pages(size)
if not jaxsparse.keep_memory():
    sys.exit(3)
kept = new_pages(size)
held = int(open("/proc/self/statm").read().split()[1])
assert jaxsparse.keep_memory(False)
print(first, kept, new_pages(size), held - int(open("/proc/self/statm").read().split()[1]))
assert "jax" not in sys.modules and "torch" not in sys.modules
"""


def test_freed_memory_is_used_again_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", NEW_PAGES], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library takes no such wishes")
    assert done.returncode == 0, done.stderr
    first, kept, after, given_back = map(int, done.stdout.split())
    pages = (40 << 20) // resource.getpagesize()
    assert kept < 5 < min(first, after)
    assert given_back > pages // 2


def test_a_c_library_without_the_settings_is_told(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not jaxsparse.keep_memory()
