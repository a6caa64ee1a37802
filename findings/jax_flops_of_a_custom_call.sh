#!/usr/bin/env bash
# jax 0.10.2, cost_analysis() of a lowered program, on a CPU.
#
# One would expect that "flops" counts what XLA can see, and that an operation that XLA can't look into, such as a call
# of LAPACK, adds nothing, or makes the whole unknown.
#
# Each custom call adds -1. The Q of a QR factorisation, which is two calls of LAPACK, takes -2 FLOPs. Beside a matrix
# product of 1024 FLOPs, both take 1022.
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

x = jnp.eye(8)


def flops(f):
    return jax.jit(f).lower(x).cost_analysis()["flops"]


print("jax", jax.__version__)
seen = [flops(f) for f in (lambda x: x @ x, lambda x: jnp.linalg.qr(x)[0], lambda x: (x @ x, jnp.linalg.qr(x)[0]))]
print("flops of a product, of Q, of both:", seen)
sys.exit(seen != [1024, -2, 1022])
PYTHON
