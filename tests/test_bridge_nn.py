"""The torch layers: like torch.nn.Linear in everything but what they store."""

import copy
import functools
import io
import math
import pickle

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxsparse import ops
from jaxsparse.formats import BlockPattern
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, function, products, torch_to_jax

LAYERS = {
    "block-diagonal": lambda **kw: BlockDiagLinear(24, 36, 3, **kw),
    "block-sparse": lambda **kw: BlockSparseLinear(23, 37, 0.5, (4, 8), **kw),
    "unstructured": lambda **kw: SparseLinear(24, 36, 0.2, **kw),
}
_to_dense = jax.jit(BlockPattern.to_dense)
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def dense_weight(layer):
    """W (in, out) as torch has it."""
    if isinstance(layer, BlockDiagLinear):
        return torch.block_diag(*layer.weight)
    return torch.from_numpy(np.array(_to_dense(layer.pattern, torch_to_jax(layer.weight))))


def jax_product(layer):
    """The layer's product as a JAX function of (x, weight, bias)."""
    if isinstance(layer, BlockDiagLinear):
        return functools.partial(ops.block_diag_matmul, backend=layer._product.backend)
    return lambda x, weight, bias: ops.spmm(x, weight, layer.pattern, bias, backend=layer._product.backend)


# ---- values and gradients ----------------------------------------------------------


@each_layer
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3, 2)], ids=str)
def test_a_layer_multiplies_by_its_dense_matrix(make, batch):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(*batch, layer.in_features)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer) + layer.bias)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "xla"])
def test_gradients_equal_those_in_jax_bit_for_bit(make, dtype, backend):
    torch.manual_seed(0)
    layer = make(dtype=dtype, backend=backend)
    x = torch.randn(5, layer.in_features).to(dtype).requires_grad_()
    cotangent = torch.randn(5, layer.out_features).to(dtype)
    got = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)
    arrays = torch_to_jax((x, layer.weight, layer.bias))
    want = list(jax.jit(lambda g, *a: jax.vjp(jax_product(layer), *a)[1](g))(torch_to_jax(cotangent), *arrays))
    if dtype == torch.bfloat16 and backend is None and not products.WHY_NOT:  # this sum over rows is torch's
        want[2] = torch_to_jax(cotangent.sum(0))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(torch_to_jax(ours), theirs)


FULL = {
    "one block": lambda: BlockDiagLinear(12, 20, 1),
    "density 1 of blocks": lambda: BlockSparseLinear(12, 20, 1.0, 4),
    "density 1 of odd blocks": lambda: BlockSparseLinear(12, 20, 1.0, (5, 7)),
    "density 1 of entries": lambda: SparseLinear(12, 20, 1.0),
}


@pytest.mark.parametrize("make", FULL.values(), ids=FULL)
def test_a_full_layer_equals_torchs_linear(make):
    torch.manual_seed(0)
    layer, linear, x = make(), torch.nn.Linear(12, 20), torch.randn(7, 12)
    with torch.no_grad():
        linear.weight.copy_(dense_weight(layer).T)
        linear.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), linear(x))
    grads = [torch.autograd.grad(m(x).square().sum(), m.bias)[0] for m in (layer, linear)]
    torch.testing.assert_close(*grads)


@each_layer
def test_training_with_adam_follows_a_masked_dense_layer(make):
    torch.manual_seed(0)
    layer = make()
    mask = (dense_weight(layer) != 0).float()
    dense, bias = dense_weight(layer).detach().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    steps = torch.optim.Adam(layer.parameters(), 0.01), torch.optim.Adam([dense, bias], 0.01)
    for _ in range(5):
        x = torch.randn(8, layer.in_features)
        for step, y in zip(steps, (layer(x), x @ (dense * mask) + bias), strict=True):
            step.zero_grad()
            (y - 1).square().mean().backward()
            step.step()
    torch.testing.assert_close(dense_weight(layer), dense * mask, atol=1e-5, rtol=1e-4)
    moments = steps[0].state[layer.weight]
    assert moments["exp_avg"].shape == layer.weight.shape


def test_second_derivatives_are_those_of_the_dense_product():
    torch.manual_seed(0)
    layer = SparseLinear(6, 5, 0.5, bias=False)
    x = torch.randn(3, 6, requires_grad=True)

    def penalty(f):
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(penalty(layer), penalty(lambda x: x @ dense_weight(layer)))


# ---- initial values ----------------------------------------------------------


@pytest.mark.parametrize(
    "make, fan_in",
    [
        (lambda: BlockDiagLinear(512, 256, 4), 128),
        (lambda: BlockSparseLinear(512, 256, 0.25, 32), 128),
        (lambda: SparseLinear(512, 256, 0.1), 51),
        (lambda: torch.nn.Linear(512, 256), 512),
    ],
)
def test_values_are_drawn_as_torch_draws_them_from_the_effective_fan_in(make, fan_in):
    torch.manual_seed(0)
    layer, bound = make(), 1 / math.sqrt(fan_in)
    for p in (layer.weight, layer.bias):
        assert p.abs().max() <= bound and abs(p.std() * math.sqrt(3) / bound - 1) < 0.1


@each_layer
def test_torchs_seed_decides_values_and_pattern(make):
    layers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layers.append(make().state_dict())
    same, other = ([torch.equal(layers[0][k], layers[i][k]) for k in layers[0]] for i in (1, 2))
    assert all(same) and not all(other)


def test_what_lies_beyond_the_edge_is_zero_and_stays_so():
    layer = LAYERS["block-sparse"]()
    outside = ~torch.from_numpy(np.array(layer.pattern.edge_mask()))
    assert outside.any()
    step = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 23)).square().sum().backward()
    step.step()
    assert layer.weight[outside].abs().sum() == 0
    layer.reset_parameters()
    assert layer.weight[outside].abs().sum() == 0 and layer.weight.abs().sum() > 0


# ---- construction ----------------------------------------------------------


@pytest.mark.parametrize(
    "as_array", [lambda m: m, lambda m: m.float(), lambda m: m.numpy()], ids=["bool", "float", "numpy"]
)
def test_a_mask_is_in_torchs_orientation(as_array):
    torch.manual_seed(0)
    mask = torch.rand(20, 12) < 0.3
    layer = SparseLinear(12, 20, mask=as_array(mask))
    assert torch.equal(dense_weight(layer).T != 0, mask)
    blocks = BlockSparseLinear(12, 20, block=4, mask=as_array(mask))
    assert (dense_weight(blocks).T != 0)[mask].all()


def test_a_pattern_may_be_given_and_comes_back_even_transposed():
    pattern = BlockPattern.random(jax.random.key(0), (12, 20), density=0.5, block=(4, 5))
    layer, back = BlockSparseLinear(12, 20, pattern=pattern), BlockSparseLinear(20, 12, pattern=pattern.T)
    x = torch.randn(3, 20)
    for ours, theirs in zip(jax.tree.leaves(layer.pattern), jax.tree.leaves(pattern), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    torch.testing.assert_close(back(x), x @ dense_weight(back) + back.bias)
    assert torch.equal(dense_weight(back) != 0, dense_weight(layer).T != 0)


def test_device_dtype_and_bias_are_those_of_linear():
    for make in LAYERS.values():
        layer = make(bias=False, dtype=torch.bfloat16, device="cpu")
        assert layer.bias is None and layer.weight.dtype == torch.bfloat16
        assert layer(torch.ones(2, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer.float()(torch.ones(2, layer.in_features)).dtype == torch.float32


def test_the_repr_reads_like_that_of_linear():
    sizes = "in_features=24, out_features=36"
    assert repr(BlockDiagLinear(24, 36, 3)) == f"BlockDiagLinear({sizes}, num_blocks=3, bias=True)"
    blocks = BlockSparseLinear(24, 36, 0.5, 4, bias=False)
    assert repr(blocks) == f"BlockSparseLinear({sizes}, density=0.5, block=(4, 4), bias=False)"
    assert repr(SparseLinear(24, 36, 0.2)) == f"SparseLinear({sizes}, density=0.2002, bias=True)"


# ---- copies and checkpoints ----------------------------------------------------------


@each_layer
def test_copies_and_checkpoints_compute_the_same_and_share_nothing(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(3, layer.in_features)
    y, file = layer(x), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make()  # of another random pattern
    fresh.load_state_dict(torch.load(file, weights_only=True))
    meta = make(device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), y)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    "other, reason",
    [
        (lambda: BlockSparseLinear(36, 24, 0.5, 4), r"= \[24, 36, 4, 4, 0\], this layer \[36, 24, 4, 4, 0\]"),
        (lambda: BlockSparseLinear(24, 36, 0.5, (2, 8)), r"this layer \[24, 36, 2, 8, 0\]"),
        (lambda: BlockSparseLinear(24, 36, 0.25, 4), r"size mismatch for weight: \[27, 4, 4\] was saved"),
    ],
)
def test_a_pattern_of_other_sizes_is_refused_whole(other, reason):
    layer = other()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=reason):
        layer.load_state_dict(BlockSparseLinear(24, 36, 0.5, 4).state_dict(), strict=False)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_equal_layers_share_their_compiled_code_where_they_go_through_jax():
    first, second = (SparseLinear(10, 7, 0.3, backend="xla") for _ in range(2))
    for layer in (first, second):
        layer(torch.ones(4, 10)).sum().backward()
    (op,) = first._through_jax.function.ops.values()
    assert first._through_jax is second._through_jax and op.traces == 1


@each_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["x", "a_first_name"])
def test_parameters_and_patterns_are_kept_as_views_and_inputs_never(make, bias, name):
    layer, x = make(bias=bias, backend="xla"), torch.ones(2, make().in_features)
    traced = layer._through_jax.function
    named = function.TracedFunction(lambda **kw: traced.fn(x=kw.pop(name), **kw), "renamed")
    index = layer._index() if isinstance(layer, BlockSparseLinear) else None
    named((), {"bias": layer.bias, "index": index, "weight": layer.weight, name: x}, layer._views)
    kept = {place for place, view in layer._views.kept.items() if view is not None}
    weights = {"weight", "bias"} if bias else {"weight"}
    assert weights <= kept <= weights | {f"index[{k}]" for k in range(5)}


# ---- dtypes and errors ----------------------------------------------------------


@each_layer
def test_autocast_is_followed_as_linear_follows_it(make):
    layer = make()
    linear, x = torch.nn.Linear(layer.in_features, layer.out_features), torch.randn(3, layer.in_features)
    for given in (x, x.bfloat16(), x.half()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
            assert y.dtype == linear(given).dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="input is torch.float16, but the weight torch.float32.*autocast"):
        SparseLinear(4, 4, 0.5)(torch.ones(2, 4, dtype=torch.float16))


@each_layer
def test_an_input_of_other_features_is_refused(make):
    for backend in (None, "xla"):
        with pytest.raises(ValueError, match=r"x .*shape [\[(]2, 5[\])]"):
            make(backend=backend)(torch.ones(2, 5))


PATTERN = BlockPattern.random(jax.random.key(0), (8, 8), density=0.5, block=4)
WRONG = [
    (lambda: SparseLinear(8, 8), "exactly one of density, pattern and mask: got none"),
    (lambda: BlockSparseLinear(8, 8, 0.5, pattern=PATTERN), "got density and pattern"),
    (
        lambda: BlockSparseLinear(8, 12, pattern=PATTERN),
        r"of a \(8, 8\) \(in, out\) matrix, but the layer maps 8",
    ),
    (lambda: SparseLinear(8, 8, pattern=PATTERN), r"blocks of \(4, 4\).*use BlockSparseLinear"),
    (lambda: SparseLinear(8, 4, mask=torch.ones(8, 4)), r"\(8, 4\), but must be .* = \(4, 8\).*Transpose"),
    (lambda: BlockSparseLinear(8, 8, 1.5, 4), r"density=1.5 is outside \[0, 1\]"),
    (lambda: BlockSparseLinear(8, 8, 0.5, 16), "larger than the matrix"),
    (lambda: BlockDiagLinear(10, 8, 4), "10 = 2 x 4 \\+ 2"),
    (lambda: SparseLinear(8, 8, 0.5, backend="none such")(torch.ones(1, 8)), "none such"),
]


@pytest.mark.parametrize("make, reason", WRONG)
def test_wrong_arguments_are_refused_with_a_way_out(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
    with pytest.raises(TypeError, match="takes no block"):
        SparseLinear(8, 8, 0.5, block=4)


def test_float64_works_where_jax_has_it(x64):
    layer = SparseLinear(6, 5, 0.5, dtype=torch.float64, backend="xla")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,)) and jnp.zeros(1).dtype == jnp.float64
