"""Run by test_mesh.py with eight CPU devices: layers whose initializers say where their numbers lie on a mesh."""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsparse import BlockPattern, checkpoint, linen, spmm
from jaxsparse import nnx as sparse_nnx

AUTO, EXPLICIT = (
    jax.make_mesh((2, 4), ("data", "model"), axis_types=(t,) * 2) for t in (AxisType.Auto, AxisType.Explicit)
)
X = jax.random.normal(jax.random.key(0), (8, 64))
KEY, DRAW, ZEROS = jax.random.key(1), nn.initializers.lecun_normal(), nn.initializers.zeros_init()
RULES = (("wide", "model"),)
# name: (Linen, NNX, the axes of the kernel)
LAYERS = {
    "dense": (nn.Dense, nnx.Linear, {}, (None, "model")),
    "block-diagonal": (linen.BlockDiagDense, sparse_nnx.BlockDiagLinear, {"num_blocks": 4}, ("model", None, None)),
    "block-sparse": (
        linen.BlockSparseDense,
        sparse_nnx.BlockSparseLinear,
        {"density": 0.5, "block": 8},
        ("model", None, None),
    ),
    "unstructured": (linen.SparseDense, sparse_nnx.SparseLinear, {"density": 0.5}, ("model",)),
}
WRAPPERS = {
    "with_partitioning": nn.with_partitioning,
    "with_logical_partitioning": lambda init, names: nn.with_logical_partitioning(
        init, tuple("wide" if name == "model" else name for name in names), rules=RULES
    ),
}


def same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def specs(tree):
    """Of each array, with a name for every dimension; arrays without a mesh have none."""
    return jax.tree.map(lambda a: tuple(a.sharding.spec) + (None,) * (a.ndim - len(a.sharding.spec)), tree)


def lies(array, mesh, *axes) -> bool:
    return array.sharding.is_equivalent_to(NamedSharding(mesh, P(*axes)), array.ndim)


def check_linen(name: str, wrapper: str) -> None:
    make, _, options, axes = LAYERS[name]
    wrap = WRAPPERS[wrapper]
    plain = make(32, **options)
    layer = make(32, **options, kernel_init=wrap(DRAW, axes), bias_init=wrap(ZEROS, ("model",)))
    variables = nn.unbox(layer.init(KEY, X))
    same(variables, plain.init(KEY, X))  # the very numbers that come without metadata
    shapes = jax.eval_shape(layer.init, KEY, X)
    if wrapper == "with_partitioning":
        found = nn.get_partition_spec(shapes)
        assert found["params"] == {"kernel": P(*axes), "bias": P("model")}, found
        assert set(jax.tree.leaves(found.get("pattern", {}))) <= {P()}
        sharding = nn.get_sharding(shapes, AUTO)
    else:
        sharding = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), AUTO, RULES)
    with jax.set_mesh(AUTO):
        placed = jax.jit(layer.init, out_shardings=sharding)(KEY, X)
        params = nn.unbox(placed["params"])
        assert specs(params) == {"kernel": axes, "bias": ("model",)}, specs(params)
        same(nn.unbox(placed), variables)
        state = jax.jit(optax.adam(1e-3).init)(placed["params"])
        assert specs(nn.unbox(state[0].mu)) == specs(params)
        y = jax.jit(layer.apply)(placed, X)
    np.testing.assert_allclose(y, plain.apply(variables, X), rtol=1e-5, atol=1e-5)


def check_stacks() -> None:
    """`nn.scan` and `nnx.vmap` put their axis into the metadata of the values; every device has the patterns."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(DRAW, ("model",))
            return linen.SparseDense(64, density=0.5, kernel_init=init)(x), None

    lifted = nn.scan(
        Body,
        variable_axes={"params": 0, "pattern": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    found = nn.get_partition_spec(jax.eval_shape(lifted().init, KEY, X, None))
    assert found["params"]["SparseDense_0"]["kernel"] == P("layers", "model"), found

    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(rngs):
        init = nnx.with_partitioning(DRAW, ("model",), eager_sharding=False)
        return sparse_nnx.SparseLinear(64, 64, density=0.5, kernel_init=init, rngs=rngs)

    assert nnx.get_partition_spec(nnx.state(stack(nnx.Rngs(0))))["kernel"].get_value() == P("layers", "model")


def check_nnx(name: str, mesh, how: str) -> None:
    _, make, options, axes = LAYERS[name]
    if how == "with_partitioning":
        metadata = {
            "kernel_init": nnx.with_partitioning(DRAW, axes),
            "bias_init": nnx.with_partitioning(ZEROS, ("model",)),
        }
    else:
        metadata = {"kernel_metadata": {"out_sharding": axes}, "bias_metadata": {"out_sharding": ("model",)}}

    def create():
        return make(64, 32, **options, **metadata, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        for model in (create(), nnx.jit(create)()):
            same(nnx.state(model, nnx.Param), nnx.state(make(64, 32, **options, rngs=nnx.Rngs(0)), nnx.Param))
            optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
            moments = nnx.state(optimizer)["opt_state"][0]["mu"]
            for values in (nnx.state(model, nnx.Param), moments):
                assert lies(values["kernel"][...], mesh, *axes) and lies(values["bias"][...], mesh, "model"), values
        state = nnx.state(model)
        shardings = nnx.get_named_sharding(state, mesh)
        assert jax.tree.structure(shardings) == jax.tree.structure(state)
        _, abstract = nnx.get_abstract_model(create, mesh)
        assert abstract["kernel"].get_value().sharding.spec == P(*axes)
        same(jax.device_put(state, shardings), state)


def check_parts(axis: int, block: int) -> None:
    """Column and row parallel: eight pieces on eight devices make the product, and get their values' gradients."""
    pattern = BlockPattern.random(jax.random.key(2), (60, 52), density=0.4, block=block)
    parts, x = pattern.split(8, axis), jax.random.normal(KEY, (4, 60))
    blocks = jax.random.normal(KEY, pattern.values_shape)
    inputs, outputs = ((P(None, "d"), P()), (P(), P(None, "d")))[axis]

    def step(x, values, parts):
        def piece(values):
            return parts.cut(spmm(parts.fit(x), values[0], parts.own))

        y, back = jax.vjp(piece, values)
        y = jax.lax.psum(y, "d") if axis == 0 else y
        return y, *back(jnp.ones_like(y))

    line = jax.sharding.Mesh(jax.devices(), ("d",))
    specs = {"in_specs": (inputs, P("d"), P("d")), "out_specs": (outputs, P("d"))}
    split = jax.jit(jax.shard_map(step, mesh=line, **specs, check_vma=False))
    y, dw = split(parts.slices(x) if axis == 0 else x, parts.split(blocks), parts)
    truth, back = jax.vjp(lambda w: spmm(x, w, pattern), blocks)
    np.testing.assert_allclose(y[:, :52], truth, rtol=1e-5, atol=1e-5)
    inside = parts.split(jnp.ones_like(blocks)) != 0
    np.testing.assert_allclose(parts.join(dw), back(jnp.ones_like(truth))[0], rtol=1e-5, atol=1e-5)
    if axis == 0:
        assert not np.asarray(dw)[~np.asarray(inside)].any()


def check_checkpoints(folder: Path) -> None:
    """Saved by a mesh of 2 x 4, restored onto one of 4 x 2 and onto one device, pattern included, in both forms."""
    make, _, options, axes = LAYERS["unstructured"]
    layer = make(32, **options, kernel_init=nn.with_partitioning(DRAW, axes))
    shapes = jax.eval_shape(layer.init, KEY, X)
    saved = nn.unbox(jax.jit(layer.init, out_shardings=nn.get_sharding(shapes, AUTO))(KEY, X))
    assert len(saved["params"]["kernel"].sharding.device_set) == 8
    other = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    one = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    checkpoint.save(folder / "c.safetensors", saved)
    same(checkpoint.load(folder / "c.safetensors", saved), saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", saved)
        checkpointer.wait_until_finished()
        for mesh in (other, one):
            shardings = nn.unbox(nn.get_sharding(shapes, mesh))
            target = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), nn.unbox(shapes), shardings
            )
            got = checkpointer.restore(folder / "orbax", target)
            same(got, saved)
            assert got["params"]["kernel"].sharding == NamedSharding(mesh, P("model"))
            assert got["pattern"]["pattern"].col_ptr.sharding.is_fully_replicated


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for name in LAYERS:
        check_linen(name, "with_partitioning")
    check_linen("block-sparse", "with_logical_partitioning")
    check_nnx("dense", AUTO, "metadata")
    check_nnx("block-diagonal", EXPLICIT, "with_partitioning")
    check_nnx("block-sparse", AUTO, "with_partitioning")
    check_nnx("unstructured", EXPLICIT, "metadata")
    check_stacks()
    for axis, block in ((0, 1), (1, 4)):
        check_parts(axis, block)
    with tempfile.TemporaryDirectory() as folder:
        check_checkpoints(Path(folder))
    print("checked", len(LAYERS), "layers on", len(jax.devices()), "devices")
