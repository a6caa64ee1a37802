"""Block-diagonal layers of sizes at which torch is faster by its own operators, without a node of ours."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch

from torch_bridge import _matrix, _memory, products

ROWS = [(5,), (2, 3), (0,), ()]  # leading dimensions of x
SIZES = [(1, 6, 4), (3, 4, 6)]


def operands(sizes, leading):
    n, i, o = sizes
    make = torch.Generator().manual_seed(0)
    shapes = ((*leading, n * i), sizes, (n * o,))
    return [torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(_matrix, "_is_torchs", lambda sizes: True)


@pytest.mark.parametrize("leading", ROWS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_derivatives_are_those_of_the_dense_matrix(always, sizes, leading):
    x, w, bias = operands(sizes, leading)
    matrix = _matrix.Diagonal(sizes)
    y = products.multiply(matrix, x, w, bias)
    torch.testing.assert_close(y, x @ torch.block_diag(*w) + bias)
    torch.testing.assert_close(products.multiply(matrix, x, w), x @ torch.block_diag(*w))
    torch.testing.assert_close(products.multiply(matrix.T, y, w), y @ torch.block_diag(*w).T)
    if x.numel():
        assert torch.autograd.gradgradcheck(lambda *a: products.multiply(matrix, *a), (x, w, bias))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_node_of_ours_is_in_the_graph(always, sizes):
    y = products.multiply(_matrix.Diagonal(sizes), *operands(sizes, (5,)))
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert not {name for name in names if name.startswith("Multiply")} and "AccumulateGrad" in names


@pytest.mark.parametrize(
    "sizes, own",
    [
        ((1, 64, 64), True),
        ((1, 32, 64), False),
        ((8, 128, 256), True),
        ((8, 64, 256), False),
        ((2, 256, 512), True),
        ((2, 128, 256), False),
        ((1, 1024, 1024), False),
    ],
)
def test_which_layers_are_multiplied_so(sizes, own):
    assert _matrix._is_torchs(sizes) is own


def test_halves_are_not(always):
    x, w, bias = (t.detach().bfloat16() for t in operands(SIZES[1], (5,)))
    y = products.multiply(_matrix.Diagonal(SIZES[1]), x, w, bias.requires_grad_())
    assert type(y.grad_fn).__name__ == "MultiplyBackward"


def test_large_results_lie_in_large_pages_and_small_ones_as_they_are(monkeypatch):
    asked = []
    monkeypatch.setattr(_memory, "_advise", lambda: lambda *call: asked.append(call))
    small, large = torch.empty(1000), torch.empty(_memory._LARGE // 4 + 1000)
    assert _memory.in_large_pages(small) is small and not asked
    assert _memory.in_large_pages(large) is large
    ((begin, length, advice),) = asked
    assert begin % _memory._PAGE == 0 and large.data_ptr() <= begin < large.data_ptr() + _memory._PAGE
    assert begin + length == large.data_ptr() + large.nbytes and advice == 14
