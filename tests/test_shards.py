"""Data parallel over devices: each multiplies its share of the batch, and the weight's gradient is their sum."""

import devices
import pytest

pytestmark = pytest.mark.slow  # two devices in processes of their own
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

# What `shard_map` checks unless it is told not to: a result that differs from device to device is no replicated one.
CHECKED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxsparse import BlockPattern, block_diag_matmul, sddmm, spmm

mesh = jax.sharding.Mesh(jax.devices(), ("data",))
draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
x, dy, blocks = draw(0, 8, 48), draw(1, 8, 32), draw(2, 4, 12, 8)
entries, tiles = (BlockPattern.random(jax.random.key(3), (48, 32), density=0.3, block=b) for b in (1, 8))


def products(backend):
    # name: (function, operands, whether the batch is summed over)
    how = {"backend": backend}
    found = {"block_diag": (lambda x, w: block_diag_matmul(x, w, **how), (x, blocks), False)}
    for name, p in (("entries", entries), ("tiles", tiles), ("transposed", tiles.T)):
        a, b = (dy, x) if p.transposed else (x, dy)
        w = draw(4, *p.values_shape)
        found["spmm " + name] = (lambda x, w, p=p: spmm(x, w, p, **how), (a, w), False)
        found["sddmm " + name] = (lambda x, dy, p=p: sddmm(x, dy, p, **how), (a, b), True)
    return found


def sharded(f, in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def refusal(f, *operands):
    try:
        f(*operands)
    except (ValueError, TypeError) as error:
        return str(error)


def dense(x, w):
    return x @ w


want = "which require replication which can't be statically inferred"
assert want in refusal(sharded(dense, (P("data"), P()), P()), x, draw(5, 48, 32))
checked = 0
for backend in (None, "xla"):
    for name, (f, operands, summed) in products(backend).items():
        specs, whole = (P("data"), P("data") if summed else P()), f
        said = refusal(jax.jit(sharded(f, specs, P())), *operands)
        assert said and want in said, (backend, name, said)
        if summed:
            whole = lambda *o: jax.lax.psum(f(*o), "data")
        else:
            said = refusal(jax.jit(sharded(jax.vmap(f, (0, None)), specs, P())), operands[0][:, None], operands[1])
            assert said and want in said, (backend, name, said)
            grad = jax.grad(lambda w, x: (f(x, w) ** 2).sum())
            step = jax.jit(sharded(grad, (P(), P("data")), P()))
            np.testing.assert_allclose(step(*operands[::-1]), grad(*operands[::-1]), rtol=1e-4, atol=1e-4)
        truth = f(*operands)
        split = sharded(whole, specs, P() if summed else P("data"))
        alike = sharded(f, (P(), P()), P())
        got = jax.jit(lambda *o: (split(*o), alike(*o)))(*operands)
        np.testing.assert_allclose(got, (truth, truth), rtol=1e-5, atol=1e-5)
        checked += 1
for name, (f, operands, summed) in products("interpret").items():
    assert refusal(sharded(f, (P("data"), P("data") if summed else P()), P()), *operands), name
print("checked", checked, "products on", len(jax.devices()), "devices")
"""


def run(program: str) -> str:
    done = devices.run(2, "-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shard_map_over_the_batch():
    assert "equal on 2 devices" in run(PROGRAM)


def test_shard_map_refuses_a_share_of_a_product_as_a_replicated_result():
    assert "checked 14 products on 2 devices" in run(CHECKED)
