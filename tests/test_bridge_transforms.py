"""torch.func and forward mode through the operators of torch.ops.jaxsparse, and inside of torch.compile."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from matrices import MATRICES, TRANSFORMS, problem
from torch import func
from torch.autograd import forward_ad

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear
from torch_bridge._matrix import ACTIVATIONS, WHY_NOT

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:Attempted to insert a get_attr Node:UserWarning"
)

if WHY_NOT:
    pytest.skip(f"the kernels can't be called on tensors here: {WHY_NOT}", allow_module_level=True)

each_matrix = pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
each_transform = pytest.mark.parametrize("name", TRANSFORMS)
each_view = pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])


@each_matrix
@each_view
@each_transform
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_operator_of_a_product_transforms_as_the_dense_one(make, transposed, name, activation):
    matrix, dense, x, w, bias, _ = problem(make, transposed, batch=(5,))
    inside, bias = make()[1].double(), bias.detach()

    def ours(x, w):
        return matrix.operator("multiply", x, w * inside, bias, activation).tanh()

    def theirs(x, w):
        y = x @ dense(w) + bias
        return (ACTIVATIONS[activation](y) if activation else y).tanh()

    got, want = (TRANSFORMS[name](f, x.detach(), w.detach()) for f in (ours, theirs))
    torch.testing.assert_close(got, want)


@each_matrix
@each_view
@each_transform
def test_the_operator_of_a_sample_transforms_as_the_dense_one(make, transposed, name):
    matrix, dense, x, w, _, dy = problem(make, transposed, batch=(5,))
    inside, zeros = make()[1].double(), torch.zeros_like(w)

    def ours(x, dy):
        return (matrix.operator("sample", x, dy) * inside).tanh()

    def theirs(x, dy):
        return (func.vjp(lambda w: x @ dense(w), zeros)[1](dy)[0] * inside).tanh()

    def of_rows(f):  # vmap over x hands over one row
        return lambda x, dy: f(torch.atleast_2d(x).expand(5, -1), torch.atleast_2d(dy))

    got, want = (TRANSFORMS[name](of_rows(f), x.detach(), dy.detach()) for f in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_the_operator_of_both_gradients_has_derivatives_and_batches():
    matrix, dense, x, w, _, dy = problem(MATRICES["single entries"], False, batch=(5,))
    x, w, dy, how = x.detach(), w.detach(), dy.detach(), (list(matrix.index), list(matrix.sizes))

    def ours(x, w, dy):
        dx, dw = torch.ops.jaxsparse.spmm_grads(x, w, dy, *how)
        return dx.square().sum() + dw.pow(3).sum()

    def theirs(x, w, dy):
        dx, dw = func.vjp(lambda x, w: x @ dense(w), x, w)[1](dy)
        return dx.square().sum() + dw.pow(3).sum()

    for transform in (
        lambda f: func.grad(f, (0, 1, 2))(x, w, dy),
        lambda f: func.hessian(f, 1)(x, w, dy),
        lambda f: func.vmap(f)(x[:, None], torch.stack([w] * 5), dy[:, None]),
        lambda f: torch.autograd.functional.jvp(lambda w: f(x, w, dy), w, w)[1],
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@each_matrix
def test_the_operator_follows_dual_tensors(make):
    matrix, dense, x, w, bias, _ = problem(make, False)
    tangents = [torch.randn_like(t) for t in (x, w, bias)]
    for given in range(1, 8):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, d) if given >> k & 1 else t
                for k, (t, d) in enumerate(zip((x, w * make()[1], bias), tangents, strict=True))
            ]
            got = forward_ad.unpack_dual(matrix.operator("multiply", *duals, None)).tangent
            want = forward_ad.unpack_dual(duals[0] @ dense(duals[1]) + duals[2]).tangent
            torch.testing.assert_close(got, want)


LAYERS = {
    "block-diagonal": lambda **kw: BlockDiagLinear(12, 8, 2, **kw),
    "block-sparse": lambda **kw: BlockSparseLinear(12, 8, 0.5, (4, 2), **kw),
    "unstructured": lambda **kw: SparseLinear(12, 8, 0.4, **kw),
}
INSIDE = ("vmap over both", "per-sample gradients", "hessian", "forward under vmap", "vmap under forward")


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", INSIDE)
def test_a_compiled_function_may_transform_a_layer(make, name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = make(activation="silu", dtype=torch.float64)

    def transformed(x, w):
        return TRANSFORMS[name](lambda x, w: func.functional_call(layer, {"weight": w}, (x,)), x, w)

    x, w = torch.randn(5, 12, dtype=torch.float64), layer.weight.detach()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), transformed(x, w))
