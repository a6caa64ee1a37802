#!/usr/bin/env bash
# jax 0.10.2, jnp.asarray of a NumPy array, on a CPU.
#
# Arrays of JAX are immutable, and the page of jnp.asarray says that it copies only when necessary. In either reading
# one would expect that jnp.asarray(a) and jnp.asarray(a, a.dtype), which asks for the dtype of `a`, do the same.
#
# Without the dtype, `a` is copied. With it, the result shares the memory of `a` where that starts at a multiple of 64
# bytes: writing to `a` changes the array of JAX. NumPy aligns to 16 bytes, so a program shares or copies by chance.
# Seen on 2026-11-27.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np


def ones(offset):
    """int32 ones in memory that starts this many bytes behind a multiple of 64."""
    memory = np.zeros(4096 + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    a = memory[start : start + 4096].view(np.int32)
    a[:] = 1
    return a


print("jax", jax.__version__)
seen = {}
for offset in (0, 16):
    for name, convert in (("asarray(a)", jnp.asarray), ("asarray(a, jnp.int32)", lambda a: jnp.asarray(a, jnp.int32))):
        a = ones(offset)
        b = jax.block_until_ready(convert(a))
        a[:] = 0
        seen[name, offset] = int(b.sum())
        print(f"{name}, {offset} bytes behind a multiple of 64: its sum after a[:] = 0 is {seen[name, offset]}")
sys.exit(list(seen.values()) != [1024, 0, 1024, 1024])
PYTHON
