"""torch.compile and torch.export through JAX functions, Flax models and sparse layers, in one graph."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen

from torch_bridge import BlockSparseLinear, BridgeError, from_flax, jax2torch
from torch_bridge.function import TracedFunction
from torch_bridge.operator import handle_of

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"
)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(6)(x))
        x = linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(2)(x)


def make_net():
    return from_flax(Net(), jax.jit(Net().init)(jax.random.key(0), jnp.ones((2, 8))))


def compiled(model, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def train(model, call, sizes):
    """Outputs, gradients and buffers of one step a size."""
    seen = []
    for size in sizes:
        torch.manual_seed(size)
        model.zero_grad()
        y = call(torch.randn(size, 8))
        y.square().sum().backward()
        seen += [y.detach(), *[p.grad.clone() for p in model.parameters()], *[b.clone() for b in model.buffers()]]
    return seen


MODELS = {"flax": make_net, "sparse": lambda: BlockSparseLinear(8, 6, 0.5, (4, 2))}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_compiled_model_trains_as_the_model_does_in_one_graph_for_all_batch_sizes(make):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    got = train(twin, compiled(twin, dynamic=True), (3, 5, 7))
    for ours, theirs in zip(got, train(model, model, (3, 5, 7)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert graphs() == 1


def test_inductor_takes_a_model_too():
    model, x = make_net().eval(), torch.randn(3, 8)
    torch.testing.assert_close(compiled(model, backend="inductor")(x), model(x))


def test_structures_and_constants_go_through_a_graph():
    f = jax2torch(lambda x, *, mode, k: {"a": x * k if mode == "times" else x, "b": (jnp.argmax(x), [x + 1, None])})
    x = torch.arange(6.0, requires_grad=True)

    def g(x, k):
        out = f(x, mode="times", k=k)
        return out["a"] + out["b"][1][0], out["b"]

    call = compiled(g)
    for k in (3, 4):  # the second becomes a symbol in torch, and a constant again for JAX
        y, (best, (_, nothing)) = call(x, k)
        assert torch.equal(y, x * k + x + 1) and best.item() == 5 and nothing is None
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.full((6,), k + 1.0))


DYNAMIC = {
    "joined": lambda x: jnp.concatenate([x, x[::2]]).reshape(-1),
    "squared": lambda x: jnp.outer(x[:, 0], x[:, 1]).reshape(-1)[::3],
    "padded": lambda x: jnp.pad(x, ((0, 5 + x.shape[0] % 4), (0, 0))),
}


@pytest.mark.parametrize("fn", DYNAMIC.values(), ids=DYNAMIC)
def test_sizes_that_are_symbolic_in_torch_are_symbolic_in_jax(fn):
    f, first = jax2torch(fn), torch.randn(6, 4)
    torch._dynamo.mark_dynamic(first, 0)
    call = compiled(lambda x: f(x) + 1)
    for x in (first, torch.randn(9, 4)):
        assert torch.equal(call(x), f(x) + 1)
    assert graphs() == 1


def test_a_size_that_the_function_checks_becomes_a_constant():
    def fn(x):
        assert x.shape[1] in (4, 5)
        return x * x.shape[1]

    f = jax2torch(fn)
    call = compiled(f, dynamic=True)
    for shape in ((6, 4), (9, 4), (3, 5)):
        assert torch.equal(call(torch.ones(shape)), torch.full(shape, float(shape[1])))
    assert graphs() == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    model = make_net().eval()
    sizes = (({0: torch.export.Dim("batch", min=2)},),)
    program = torch.export.export(model, (torch.randn(5, 8),), dynamic_shapes=sizes, strict=strict).module()
    for size in (5, 9):
        x = torch.randn(size, 8)
        torch.testing.assert_close(program(x), model(x))


def test_the_operator_passes_opcheck():
    traced, x, w = TracedFunction(lambda x, w: jnp.tanh(x @ w), "f"), torch.randn(3, 4), torch.randn(4, 2)
    traced((x, w), {})
    (op,) = traced.ops.values()
    result = torch.library.opcheck(torch.ops.torch_bridge.call, ([x, w.requires_grad_()], handle_of(op)))
    assert set(result.values()) == {"SUCCESS"}


def test_a_graph_from_elsewhere_is_refused():
    with pytest.raises(BridgeError, match="the JAX function f, which only the process"):
        torch.ops.torch_bridge.call([torch.ones(2)], "f#0")


PROGRAM = """
    import sys, torch, jax.numpy as jnp
    from torch_bridge import jax2torch
    width = int(sys.argv[1])
    f = jax2torch(lambda x: jnp.tile(x, (1, width)))
    y = torch.compile(lambda x: f(x) * 2, fullgraph=True)(torch.ones(2, 3))
    assert y.shape == (2, 3 * width) and (y == 2).all()
"""


@pytest.mark.slow  # processes that compile
def test_the_disk_cache_of_one_process_does_not_poison_another(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    environment = {**os.environ, **caches, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    for width in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(program), width], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache").exists()
