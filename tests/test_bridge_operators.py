"""The operators of torch.ops.jaxsparse, and layers under what records, exports, traces, counts or watches them."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from functorch.compile import make_boxed_func
from matrices import MATRICES, problem
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear
from torch_bridge._matrix import WHY_NOT, Diagonal

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:Attempted to insert a get_attr Node:UserWarning"
)

if WHY_NOT:
    pytest.skip(f"the kernels can't be called on tensors here: {WHY_NOT}", allow_module_level=True)


def operator_calls():
    for make in MATRICES.values():
        matrix, _, x, w, bias, dy = problem(make, False, torch.float32, (4,))
        if isinstance(matrix, Diagonal):
            yield torch.ops.jaxsparse.block_diag_matmul.default, (x, w, bias, False)
            yield torch.ops.jaxsparse.block_diag_matmul.default, (dy, w, None, True)
            yield torch.ops.jaxsparse.block_diag_outer.default, (x, dy, matrix.sizes[0])
            continue
        how = list(matrix.index), list(matrix.sizes)
        yield torch.ops.jaxsparse.spmm.default, (x, w, bias, *how, False)
        yield torch.ops.jaxsparse.spmm.default, (dy, w, None, *how, True)
        yield torch.ops.jaxsparse.sddmm.default, (x, dy, *how)
        if matrix.fuses_gradients:
            yield torch.ops.jaxsparse.spmm_grads.default, (x, w, dy, *how)


@pytest.mark.parametrize("op, arguments", list(operator_calls()), ids=lambda a: str(a) if callable(a) else "")
def test_the_operators_pass_opcheck(op, arguments):
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


LAYERS = {
    "block-diagonal": lambda **kw: BlockDiagLinear(12, 8, 2, **kw),
    "block-sparse": lambda **kw: BlockSparseLinear(11, 7, 0.5, (4, 2), **kw),
    "unstructured": lambda **kw: SparseLinear(12, 8, 0.4, **kw),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def step(call, layer, x):
    x = x.clone().requires_grad_()
    y = call(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))


@each_layer
def test_a_compiled_layer_trains_for_all_batch_sizes_and_does_not_repeat_its_forward(make):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, graphs = make(), []

    def keep(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if "jaxsparse" in str(n.target)])
        return make_boxed_func(graph)

    call = torch.compile(layer, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    for rows in (3, 5, 8):
        x = torch.randn(rows, layer.in_features)
        for got, want in zip(step(call, layer, x), step(layer, layer, x), strict=True):
            torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    forward, backward = graphs
    assert len(forward) == 1 and len(backward) <= 2 and not set(forward) & {"jaxsparse.spmm_grads.default"}


@each_layer
@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_operator_and_a_dynamic_batch(make, strict):
    layer = make().eval()
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(layer, (torch.randn(5, layer.in_features),), dynamic_shapes=sizes, strict=strict)
    assert "jaxsparse" in str(program.graph)
    for rows in (5, 9):
        x = torch.randn(rows, layer.in_features)
        torch.testing.assert_close(program.module()(x), layer(x))


@each_layer
def test_jit_trace_follows_other_inputs_and_batch_sizes(make):
    layer = make().eval()
    traced = torch.jit.trace(layer, torch.randn(3, layer.in_features))
    x = torch.randn(6, layer.in_features)
    assert torch.equal(traced(x), layer(x))


@each_layer
def test_fx_symbolic_trace_keeps_the_operator(make):
    model = torch.nn.Sequential(make().eval(), torch.nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert "jaxsparse" in str(graph.graph)
    for rows in (3, 6):
        x = torch.randn(rows, model[0].in_features)
        assert torch.equal(graph(x), model(x))


@each_layer
def test_a_layer_on_the_meta_device_has_shapes(make):
    layer = make(device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(3, 5, layer.in_features, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 5, layer.out_features), torch.bfloat16, "meta")


@each_layer
def test_the_flop_counter_counts_three_products(make):
    from torch.utils.flop_counter import FlopCounterMode

    layer = make()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, layer.in_features, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * layer.weight.numel()


class Watch(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dispatch_mode_sees_the_operators_and_changes_no_gradient(make, dtype):
    layer = make(dtype=dtype)
    x = torch.randn(5, layer.in_features, dtype=dtype)
    want = step(layer, layer, x)
    with Watch() as mode:
        got = step(layer, layer, x)
    products_seen = [name for name in mode.seen if name.startswith("jaxsparse.")]
    assert len(products_seen) == (2 if "jaxsparse.spmm_grads.default" in products_seen else 3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@each_layer
def test_the_way_through_jax_computes_the_same(make):
    layer = make()
    other = make(backend="xla")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, layer.in_features)
    for got, want in zip(step(layer, layer, x), step(other, other, x), strict=True):
        torch.testing.assert_close(got, want)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_works_without_a_switch_in_jax(make, dtype):
    layer = make(dtype=dtype)
    x = torch.randn(5, layer.in_features, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    wide = layer.to_linear().double()(x.double())
    torch.testing.assert_close(y.double(), wide, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_a_tensor_changed_between_forward_and_backward_raises_as_in_torch():
    layer = SparseLinear(12, 8, 0.4)
    x = torch.randn(3, 12, requires_grad=True)
    y = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    y = layer(x).sum()
    layer.row_index.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
