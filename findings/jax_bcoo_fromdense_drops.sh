#!/usr/bin/env bash
# jax 0.10.2, jax.experimental.sparse: BCOO.fromdense and BCSR.fromdense with `nse`, on a CPU.
#
# Under jit the number of stored entries must be given, as `nse`. A matrix that has more should be refused where its
# numbers are known, as outside of jit; or the page should say what is then lost.
#
# The entries that come last are dropped, without a word, inside jit and outside. A mask that grows by one entry loses
# one, and a matrix that loses entries still multiplies.
# Seen on 2026-11-28.
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
from jax.experimental import sparse

print("jax", jax.__version__)
seen = []
for kind in (sparse.BCOO, sparse.BCSR):
    made = kind.fromdense(jnp.diag(jnp.arange(1.0, 5.0)), nse=2)
    seen.append([float(v) for v in jnp.diag(made.todense())])
    print(f"{kind.__name__}.fromdense(diag(1, 2, 3, 4), nse=2) has the diagonal {seen[-1]}")
sys.exit(seen != [[1.0, 2.0, 0.0, 0.0]] * 2)
PYTHON
