"""The products on CPU tensors, straight to the kernels: values, and derivatives in every mode."""

import copy
import types

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from matrices import MATRICES, TRANSFORMS, pattern_of, problem
from torch import func

from torch_bridge import SparseLinear, _matrix, products
from torch_bridge._matrix import WHY_NOT, Sparse

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:Attempted to insert a get_attr Node:UserWarning"
)

if WHY_NOT:
    pytest.skip(f"the kernels can't be called on tensors here: {WHY_NOT}", allow_module_level=True)

each_matrix = pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
each_view = pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])


@each_matrix
@each_view
def test_a_product_and_its_sample_equal_the_dense_ones(make, transposed):
    matrix, dense, x, w, bias, dy = problem(make, transposed)
    y = products.multiply(matrix, x, w, bias)
    torch.testing.assert_close(y, x @ dense(w) + bias)
    expected = torch.autograd.grad((x @ dense(w)), w, dy)[0]
    torch.testing.assert_close(products.sample(matrix, x, dy), expected)


@each_matrix
@each_view
def test_derivatives_of_first_and_second_order_in_both_modes(make, transposed):
    matrix, _, x, w, bias, dy = problem(make, transposed)
    for f, operands in (
        (lambda *a: products.multiply(matrix, *a), (x, w, bias)),
        (lambda *a: products.sample(matrix, *a), (x, dy)),
    ):
        assert torch.autograd.gradcheck(f, operands, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, operands)


@each_view
@pytest.mark.parametrize("in_place", [1, 1024])
def test_large_diagonal_blocks_are_dense_products_of_torchs_own(monkeypatch, transposed, in_place):
    monkeypatch.setattr(_matrix, "_prefers_dense", lambda product, sizes: True)
    monkeypatch.setattr(_matrix, "_IN_PLACE", in_place)
    sums = types.SimpleNamespace(block_diag_backward=lambda x, dy, w, dx, dw, db, transposed: db.copy_(dy.sum((0, 1))))
    monkeypatch.setattr(_matrix, "_kernels", lambda: sums)  # no other kernel is called
    matrix, dense, x, w, bias, dy = problem(MATRICES["block-diagonal"], transposed)
    torch.testing.assert_close(products.multiply(matrix, x, w, bias), x @ dense(w) + bias)
    for f, operands in (
        (lambda *a: products.multiply(matrix, *a), (x, w, bias)),
        (lambda *a: products.multiply(matrix, *a), (x, w)),
        (lambda *a: products.sample(matrix, *a), (x, dy)),
    ):
        assert torch.autograd.gradcheck(f, operands, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, operands)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dense", ["multiply", "sample"])
def test_kernels_and_torchs_own_products_share_a_backward_pass(monkeypatch, dense, wanted):
    monkeypatch.setattr(_matrix, "_prefers_dense", lambda product, sizes: product == dense)
    matrix, expand, *operands, dy = problem(MATRICES["block-diagonal"], False)
    x, w, bias = (t.detach().requires_grad_(k in wanted) for k, t in enumerate(operands))
    for got, want in zip(
        torch.autograd.grad(products.multiply(matrix, x, w, bias), [(x, w, bias)[k] for k in wanted], dy.detach()),
        torch.autograd.grad(x @ expand(w) + bias, [(x, w, bias)[k] for k in wanted], dy.detach()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


CHOICES = [  # (kernels, product, sizes, torch's own?)
    ("avx512", "multiply", (16, 256, 256), False),
    ("avx512", "multiply", (4, 256, 256), True),
    ("avx512", "multiply", (16, 512, 512), True),
    ("avx512", "multiply", (1, 128, 128), True),
    ("avx512", "multiply", (1, 64, 64), False),
    ("avx2", "multiply", (4, 1024, 128), False),
    ("avx2", "sample", (4, 128, 128), True),
    ("avx2", "sample", (2, 128, 256), True),
    ("avx2", "sample", (64, 64, 64), False),
    ("portable", "multiply", (4, 16, 16), True),
    ("portable", "sample", (4, 8, 8), False),
]


@pytest.mark.parametrize("isa, product, sizes, dense", CHOICES, ids=str)
def test_which_products_of_diagonal_blocks_are_torchs_own(monkeypatch, isa, product, sizes, dense):
    monkeypatch.setattr(_matrix, "_isa", lambda: isa)
    assert _matrix._prefers_dense.__wrapped__(product, sizes) is dense


@each_matrix
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_only_the_gradients_that_are_wanted_are_computed_and_they_are_right(make, wanted):
    matrix, dense, *operands, dy = problem(make, False)
    operands = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(operands)]
    x, w, bias = operands
    ours = products.multiply(matrix, x, w, bias)
    for got, want in zip(
        torch.autograd.grad(ours, [operands[k] for k in wanted], dy.detach()),
        torch.autograd.grad(x @ dense(w) + bias, [operands[k] for k in wanted], dy.detach()),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@each_matrix
def test_the_bias_of_a_half_precision_product_gets_the_sum_of_its_cotangents(make):
    matrix, _, *operands, dy = problem(make, False, torch.bfloat16)
    x, w, bias = (t.detach() for t in operands)
    y = products.multiply(matrix, x, w, bias.requires_grad_())
    (db,) = torch.autograd.grad(y, [bias], dy.detach())
    torch.testing.assert_close(db, dy.detach().double().flatten(0, -2).sum(0).bfloat16())


@pytest.mark.parametrize("asked", ["x", "h", "weight", "bias", "h weight", "x weight bias"])
@pytest.mark.parametrize("large", [1, 10**9], ids=["asks", "does not ask"])
def test_what_a_backward_pass_over_a_large_weight_has_no_use_for_is_not_computed(monkeypatch, large, asked):
    seen, backward = [], Sparse.backward

    def spied(matrix, x, w, dy, wanted):
        seen.append(wanted)
        return backward(matrix, x, w, dy, wanted)

    monkeypatch.setattr(Sparse, "backward", spied)
    monkeypatch.setattr(products, "_LARGE", large)
    matrix, dense, x, w, bias, dy = problem(MATRICES["single entries"], False)
    h = x * 2
    by_name = {"x": x, "h": h, "weight": w, "bias": bias}
    operands = [by_name[name] for name in asked.split()]
    got = torch.autograd.grad(products.multiply(matrix, h, w, bias), operands, dy, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(h @ dense(w) + bias, operands, dy))
    used = ("x" in asked or "h" in asked.split(), "weight" in asked, "bias" in asked)
    assert seen == [used if large == 1 else (True, True, True)]


def test_gradients_are_accumulated_where_a_backward_pass_asks_which(monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 1)
    matrix, dense, x, w, _, dy = problem(MATRICES["single entries"], False)
    for given in (None, [x, w]):
        products.multiply(matrix, x, w).backward(dy, inputs=given)
    want = torch.autograd.grad(x @ dense(w), (x, w), 2 * dy)
    torch.testing.assert_close((x.grad, w.grad), want)


def test_tensors_that_outlived_a_transform_are_taken_out_of_their_wrappers():
    matrix, dense, *operands, _ = problem(MATRICES["single entries"], False)
    left = []
    for t in operands:
        func.grad(lambda t: left.append(t) or t.sum())(t.detach())
    x, w, bias = left
    torch.testing.assert_close(products.multiply(matrix, x, w, bias), operands[0] @ dense(operands[1]) + operands[2])


def ours_and_dense(make):
    matrix, dense, x, w, bias, _ = problem(make, False, batch=(5,))
    return (
        lambda x, w: products.multiply(matrix, x, w, bias).tanh(),
        lambda x, w: (x @ dense(w) + bias).tanh(),
        x.detach(),
        w.detach(),
    )


@each_matrix
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_they_give_for_the_dense_product(make, name):
    ours, dense, x, w = ours_and_dense(make)
    w = w if w.ndim != 3 else w
    inside = make()[1].double()
    got, want = TRANSFORMS[name](lambda x, w: ours(x, w * inside), x, w), TRANSFORMS[name](dense, x, w)
    torch.testing.assert_close(got, want)


def test_a_batch_under_vmap_is_one_call_of_the_kernel(monkeypatch):
    matrix, _, x, w, *_ = problem(MATRICES["blocks"], False, batch=(64,))
    calls = []
    multiply = Sparse.multiply
    monkeypatch.setattr(Sparse, "multiply", lambda self, *a: calls.append(a[0].shape) or multiply(self, *a))
    func.vmap(lambda x: products.multiply(matrix, x, w.detach()))(x.detach())
    assert calls == [(64, 12)]


def test_both_gradients_of_single_entries_come_from_one_kernel(monkeypatch):
    matrix, _, x, w, bias, dy = problem(MATRICES["single entries"], False)
    calls = []
    for name in ("multiply", "sample", "backward"):
        kernel = getattr(Sparse, name)
        monkeypatch.setattr(Sparse, name, lambda self, *a, k=kernel, name=name: calls.append(name) or k(self, *a))
    torch.autograd.grad(products.multiply(matrix, x, w, bias), (x, w), dy)
    assert calls == ["multiply", "backward"]


STRANGE = {
    "a slice of columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "an expanded row": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.T.contiguous().T,
    "negated lazily": lambda x: torch.complex(x, x).conj().imag,
    "negated lazily, contiguous": torch._neg_view,
    "an offset of one number": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


@each_matrix
@pytest.mark.parametrize("name", STRANGE)
def test_operands_of_every_layout_are_read_right(make, name):
    matrix, dense, x, w, bias, _ = problem(make, False, batch=(6,))
    x = STRANGE[name](x.detach())
    torch.testing.assert_close(products.multiply(matrix, x, w, bias), x @ dense(w) + bias)
    dy = STRANGE[name](torch.randn(6, bias.shape[0], dtype=torch.float64))
    expected = torch.autograd.grad(x @ dense(w), w, dy)[0]
    torch.testing.assert_close(products.sample(matrix, x, dy), expected)


@each_matrix
@each_view
def test_a_bias_and_an_index_of_strides_are_read_right(make, transposed):
    matrix, dense, x, w, bias, dy = problem(make, transposed)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in (bias.detach(), *matrix.index)]
    assert not any(t.is_contiguous() for t in strided)
    bias, matrix = strided[0].requires_grad_(), matrix.with_index(strided[1:])
    y = products.multiply(matrix, x, w, bias)
    torch.testing.assert_close(y, x @ dense(w) + bias)
    for got, want in zip(
        torch.autograd.grad(y, (x, w, bias), dy),
        torch.autograd.grad(x @ dense(w) + bias, (x, w, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_layers_whose_parameters_and_patterns_are_stacked_on_their_last_dimension():
    one, two = (SparseLinear(12, 8, pattern=pattern_of((12, 8), (1, 1))) for _ in range(2))
    tensors = [
        (a.detach(), b.detach()) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    ]
    stacked = [torch.stack(pair, -1) for pair in tensors]
    x = torch.randn(5, 12)

    def call(*values):
        return func.functional_call(one, dict(zip(one.state_dict(), values, strict=True)), (x,))

    got = func.vmap(call, in_dims=tuple(t.ndim - 1 for t in stacked))(*stacked)
    torch.testing.assert_close(got, torch.stack([one(x), two(x)]))


def test_a_batch_of_cotangents_by_the_old_vmap_is_refused_with_the_way_out():
    matrix, _, x, w, bias, _ = problem(MATRICES["blocks"], False, batch=(5,))
    y = products.multiply(matrix, x, w, bias).sum(1)
    with pytest.raises(RuntimeError, match="torch.func.vmap and jacrev work"):
        torch.autograd.grad(y, x, torch.eye(5, dtype=torch.float64), is_grads_batched=True)


def test_one_row_at_a_time_reads_a_copy_of_the_index_in_16_bits_and_anew_after_the_pattern_moved(monkeypatch):
    monkeypatch.setattr(_matrix, "_WORTH_NARROWING", 1)
    layer, other, x = SparseLinear(12, 8, 0.4), SparseLinear(12, 8, 0.4), torch.randn(1, 12)
    assert (layer.row_index != other.row_index).any()
    for source in (layer, other):
        layer.load_state_dict(source.state_dict())
        for calls in range(3):
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            assert (layer._matrix._narrow is not None) == (calls > 0)
        torch.testing.assert_close(layer(x.expand(3, -1)), layer.to_linear()(x.expand(3, -1)))
    assert copy.deepcopy(layer)._matrix is None
