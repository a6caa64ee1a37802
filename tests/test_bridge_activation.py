"""Activations of torch layers, and torch.autocast over their operators: eager, compiled, forward and backward."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from torch import func
from torch.nn import functional as F

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, products
from torch_bridge._matrix import Sparse

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
direct = pytest.mark.skipif(products.WHY_NOT is not None, reason=f"goes through JAX: {products.WHY_NOT}")

FUNCTIONS = {"relu": F.relu, "gelu": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
each_activation = pytest.mark.parametrize("activation", FUNCTIONS)
LAYERS = {
    "block-diagonal": lambda **kw: BlockDiagLinear(12, 8, 2, **kw),
    "block-sparse": lambda **kw: BlockSparseLinear(11, 7, 0.5, (4, 2), **kw),
    "unstructured": lambda **kw: SparseLinear(12, 8, 0.4, **kw),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def twins(make, activation, **options):
    """(layer with the activation, a function that applies it to what the same layer without gives, an input)."""
    torch.manual_seed(0)
    layer, plain = make(activation=activation, **options), make(**options)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, layer.in_features, dtype=layer.weight.dtype)
    return layer, plain, lambda x: FUNCTIONS[activation](plain(x)), x


def gradients(call, layer, x):
    x = x.clone().requires_grad_()
    y = call(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))


@direct
@each_activation
@each_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_applies_it_to_its_sums(make, activation, dtype, monkeypatch):
    layer, plain, _, x = twins(make, activation, dtype=dtype)
    truth = FUNCTIONS[activation](plain.to_linear().double()(x.double()))
    monkeypatch.setattr(products, "ACTIVATIONS", {})  # torch applies none
    with torch.no_grad():
        y = layer(x)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth, rtol=4 * eps, atol=4 * eps)


@each_activation
@each_layer
@pytest.mark.parametrize("backend", [None, "xla"])
def test_gradients_are_those_of_the_activation_after_the_layer(make, activation, backend):
    layer, plain, reference, x = twins(make, activation, backend=backend)
    for got, want in zip(gradients(layer, layer, x), gradients(reference, plain, x), strict=True):
        assert torch.equal(got, want)


@direct
@each_activation
@each_layer
def test_derivatives_of_every_mode_and_order(make, activation):
    layer, _, reference, x = twins(make, activation, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, x.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    x = x.detach()
    torch.testing.assert_close(func.vmap(layer)(x), reference(x))
    torch.testing.assert_close(func.jacrev(layer)(x[0]), func.jacfwd(reference)(x[0]))
    layer.requires_grad_(False)
    torch.testing.assert_close(func.vmap(layer)(x), reference(x).detach())
    torch.testing.assert_close(func.jvp(layer, (x,), (x + 1,)), func.jvp(reference, (x,), (x + 1,)))


@direct
@each_activation
@each_layer
def test_it_stays_within_the_operator_where_no_gradient_is_asked_for(make, activation):
    layer, _, reference, x = twins(make, activation)
    layer.requires_grad_(False)
    for program in (torch.export.export(layer, (x,)).module(), torch.fx.symbolic_trace(layer)):
        assert activation in program.code and "square" not in program.code
        torch.testing.assert_close(program(x), reference(x))
    assert layer.to("meta")(x.to("meta")).shape == (5, layer.out_features)


@direct
@each_activation
@each_layer
def test_a_compiled_layer_trains_with_it(make, activation):
    torch._dynamo.reset()
    layer, plain, reference, x = twins(make, activation)
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        for got, want in zip(gradients(call, layer, x[:rows]), gradients(reference, plain, x[:rows]), strict=True):
            torch.testing.assert_close(got, want)
        with torch.no_grad():
            torch.testing.assert_close(call(x[:rows]), reference(x[:rows]))


@each_layer
def test_its_name_is_checked_and_shown(make):
    assert "activation='silu'" in repr(make(activation="silu")) and "activation" not in repr(make())
    with pytest.raises(ValueError, match="unknown activation 'tanh': give 'relu', 'gelu', 'silu' or None"):
        make(activation="tanh")


# ---- torch.autocast -------------------------------------------------------------------------------------------------


def operators(make):
    """The product of a layer as an operator of x, weight and bias, and its sample as one of x and dy."""
    layer = make()
    matrix = layer._matrix if isinstance(layer, BlockDiagLinear) else Sparse(layer._index(), *layer._product.stored)
    return (
        layer,
        lambda x, w, b: matrix.operator("multiply", x, w, b, None),
        lambda x, dy: matrix.operator("sample", x, dy),
    )


@direct
@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_operators_follow_autocast_as_linear_does(make, dtype, compiled):
    torch._dynamo.reset()
    layer, multiply, sample = operators(make)
    call = torch.compile(multiply, fullgraph=True, backend="aot_eager") if compiled else multiply
    x, w, b = (t.detach().clone().requires_grad_() for t in (torch.randn(5, layer.in_features), *layer.parameters()))
    with torch.autocast("cpu", dtype=dtype):
        y = call(x, w, b)
        dw = sample(x.detach(), torch.ones(5, layer.out_features))
    want = multiply(*(t.to(dtype) for t in (x, w, b)))
    assert (y.dtype, dw.dtype) == (dtype, dtype) and torch.equal(y, want)
    got, expected = (torch.autograd.grad(z.float().square().sum(), (x, w, b)) for z in (y, want))
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)


@direct
@each_activation
@each_layer
def test_an_operator_with_an_activation_has_its_derivative(make, activation):
    layer = make()
    matrix = layer._matrix if isinstance(layer, BlockDiagLinear) else Sparse(layer._index(), *layer._product.stored)
    x, w, b = torch.randn(5, layer.in_features, requires_grad=True), *layer.parameters()
    y, z = matrix.operator("multiply", x, w, b, activation), matrix.operator("multiply", x, w, b, None)
    torch.testing.assert_close(y, FUNCTIONS[activation](z))
    got, want = (torch.autograd.grad(t.square().sum(), (x, w, b)) for t in (y, FUNCTIONS[activation](z)))
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)


@direct
@each_layer
def test_autocast_leaves_float64_alone(make):
    layer, multiply, _ = operators(lambda: make(dtype=torch.float64))
    with torch.autocast("cpu"):
        assert multiply(torch.randn(5, layer.in_features).double(), *layer.parameters()).dtype == torch.float64


@direct
@each_layer
def test_a_compiled_layer_follows_autocast_forward_and_backward(make):
    torch._dynamo.reset()
    layer = make()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, layer.in_features)
    with torch.autocast("cpu"):
        got, want = gradients(call, layer, x), gradients(layer, layer, x)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)


@direct
@each_activation
@each_layer
def test_a_trace_of_a_layer_that_trains_passes_its_own_check(make, activation):
    layer, plain, reference, x = twins(make, activation)
    traced = torch.jit.trace(layer, (x,))  # which records again without gradients, and compares
    torch.testing.assert_close(traced(x), reference(x))
    got, want = (torch.autograd.grad(f(x).square().sum(), m.weight) for f, m in ((traced, layer), (reference, plain)))
    torch.testing.assert_close(got, want)
