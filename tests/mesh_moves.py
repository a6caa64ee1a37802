"""Run by test_mesh.py with eight CPU devices: moving patterns choose on a mesh what they choose on one device."""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import BlockPattern, dynamic

ROWS, SHAPE, ADAM = 64, (96, 80), optax.adam(1e-3)
# Each input is the same numbers in another order: scores are equal but for rounding, which the order of sums decides.
RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(size=ROWS).astype(np.float32)
X, DY = np.stack([RNG.permutation(NUMBERS) for _ in range(SHAPE[0])], 1), np.ones((ROWS, SHAPE[1]), np.float32)


@jax.jit
def moved(w, pattern, state, x, dy):
    """What each of the functions makes of one weight."""
    denser = BlockPattern.random(jax.random.key(3), SHAPE, density=0.5, block=pattern.block)
    return {
        "rigl": dynamic.rigl(w, pattern, state, x=x, dy=dy, drop_fraction=0.3),
        "set": dynamic.set_(jax.random.key(5), w, pattern, state, drop_fraction=0.3),
        "gradual": dynamic.gradual(w, pattern, state, density=0.2),
        "compact": dynamic.compact(w, pattern, state, density=0.2),
        "move": dynamic.move(w, pattern, state, denser),
    }


def check(block: int, kind: AxisType, nnz: P) -> None:
    pattern = BlockPattern.random(jax.random.key(1), SHAPE, density=0.4, block=block)
    w = jax.random.normal(jax.random.key(2), pattern.values_shape)
    wanted = moved(w, pattern, ADAM.init(w), X, DY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    everywhere = jax.device_put(pattern, NamedSharding(mesh, P()))
    values = jax.device_put(w, NamedSharding(mesh, nnz))
    x, dy = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (X, DY))
    got = moved(values, everywhere, ADAM.init(values), x, dy)
    for name, result in got.items():
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_array_equal(a, b, name)
            for shard in a.addressable_shards:  # on every device
                np.testing.assert_array_equal(shard.data, np.asarray(b)[shard.index], name)
    if kind == AxisType.Explicit:
        for array in (got["rigl"][0], got["set"][2][0].mu):
            assert array.sharding.is_equivalent_to(values.sharding, w.ndim)


if __name__ == "__main__":
    auto = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    sums = jax.jit(lambda x, dy: x.T @ dy)
    cut = sums(jax.device_put(X, auto), jax.device_put(DY, auto))
    assert (np.asarray(cut) != np.asarray(sums(X, DY))).any(), "the data do not tell the order of sums"
    check(1, AxisType.Auto, P("data"))
    check(1, AxisType.Explicit, P("data"))
    check(8, AxisType.Explicit, P())
    print("chose the same on", len(jax.devices()), "devices")
