#!/usr/bin/env bash
# jax 0.10.2, jax.ffi.ffi_call inside jax.shard_map with its checks on (check_vma=True, the default), two CPU devices.
#
# shard_map checks that a result of out_specs=P() is the same on all devices. So a result that each device computes
# from its own part of the input should be refused, as it is for jnp.sqrt.
#
# A result of ffi_call is taken for the same on all devices, whatever its operands are. The program passes the check
# and returns the part of one device as if it were the result of all.
# Seen on 2026-11-27. The foreign function is LAPACK's Cholesky factor of a 1 x 1 matrix, which is its square root.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 venv/bin/python - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

jnp.linalg.cholesky(jnp.eye(1)).block_until_ready()  # loads LAPACK
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
x = jnp.array([4.0, 9.0]).reshape(2, 1, 1)


def by_ffi(a):
    types = (jax.ShapeDtypeStruct(a.shape, a.dtype), jax.ShapeDtypeStruct(a.shape[:1], jnp.int32))
    return jax.ffi.ffi_call("lapack_spotrf_ffi", types)(a, uplo=np.uint8(ord("L")))[0]


def outcome(f):
    try:
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P()))(x).ravel().tolist()
    except ValueError as error:
        return "refused: " + str(error).splitlines()[0][:100]


print("jax", jax.__version__)
print("jnp.sqrt:", by_jax := outcome(jnp.sqrt))
print("ffi_call:", by_call := outcome(by_ffi))
sys.exit(not (str(by_jax).startswith("refused") and by_call == [2.0]))
PYTHON
