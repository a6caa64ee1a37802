"""Block-diagonal layers of sizes at which torch is faster by its own operators, without a node of ours."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch

from torch_bridge import BlockDiagLinear, _matrix, _memory, products

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
        ((1, 64, 128), False),
        ((1, 128, 128), True),
        ((4, 128, 256), True),
        ((8, 64, 256), False),
        ((16, 512, 512), True),
        ((1, 1024, 1024), False),
    ],
)
def test_which_layers_are_multiplied_so(sizes, own):
    assert _matrix._is_torchs(sizes) is own


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports
def test_a_layer_is_so_under_transforms_too(always):
    layer = BlockDiagLinear(12, 18, 3, dtype=torch.float64, activation="relu")
    x = torch.randn(5, 12, dtype=torch.float64)
    y = (x @ torch.block_diag(*layer.weight) + layer.bias).relu()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], y)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), torch.func.jacfwd(layer)(x[0]))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
def test_graphs_hold_the_operator_whoever_trains(always):
    layer, x = BlockDiagLinear(12, 18, 3, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    rows = {0: torch.export.Dim("rows", min=2)}
    for trains in (True, False):
        exported = torch.export.export(layer.requires_grad_(trains), (x,), dynamic_shapes=(rows,))
        assert "jaxsparse.block_diag_matmul" in exported.graph_module.code
        torch.testing.assert_close(exported.module()(x[:3]), layer(x[:3]))


def test_a_dtype_that_does_not_fit_and_autocast_take_the_usual_way(always):
    layer = BlockDiagLinear(12, 18, 3)
    with pytest.raises(ValueError, match="nothing is cast silently"):
        layer(torch.randn(5, 12, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 12)).dtype == torch.bfloat16


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
