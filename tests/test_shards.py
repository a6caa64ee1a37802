"""Data parallel over devices: each multiplies its share of the batch, and the weight's gradient is their sum."""

import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxsparse import BlockPattern, spmm

mesh = jax.sharding.Mesh(jax.devices(), ("data",))
x = jax.random.normal(jax.random.key(0), (8, 48))
for block in (1, 8):
    pattern = BlockPattern.random(jax.random.key(1), (48, 32), density=0.3, block=block)
    w = jax.random.normal(jax.random.key(2), pattern.values_shape)
    whole = lambda w, x: (spmm(x, w, pattern) ** 2).sum()
    share = lambda w, x: jax.lax.psum(jax.grad(whole)(w, x), "data")
    split = jax.shard_map(share, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    program = jax.jit(split).lower(w, x).compile()
    np.testing.assert_allclose(program(w, x), jax.grad(whole)(w, x), rtol=1e-5, atol=1e-5)
    assert "all-gather" not in program.as_text()
print("equal on", len(jax.devices()), "devices")
"""


def test_shard_map_over_the_batch():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    code = f"import os; os.environ.update({flags})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "equal on 2 devices" in done.stdout
