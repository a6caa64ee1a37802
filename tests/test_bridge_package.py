"""Importing the bridge is light: layers on a CPU need neither JAX nor Flax, and the rest comes when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import mostly_slow

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch_bridge
from torch_bridge import products

HEAVY = {"jax", "jaxlib", "flax", "optax", "torch._dynamo"}
LAYERS = {
    "unstructured": "torch_bridge.SparseLinear(784, 512, density=0.1)",
    "ragged blocks": "torch_bridge.BlockSparseLinear(784, 500, density=0.3, block=32)",
    "block-diagonal": "torch_bridge.BlockDiagLinear(784, 512, 4)",
}
direct = pytest.mark.skipif(products.WHY_NOT is not None, reason=f"goes through JAX: {products.WHY_NOT}")


def loaded_by(code: str) -> set[str]:
    """What of `HEAVY` a new process imports that runs this code, and nothing of it before."""
    code = f"import sys, torch, torch_bridge\nassert not {HEAVY} & set(sys.modules)\n{code}\n"
    code += f"print(*{HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@direct
@pytest.mark.parametrize("make", mostly_slow(LAYERS.values()), ids=LAYERS)
def test_a_layer_on_a_cpu_is_made_called_trained_and_copied_without_jax(make):
    code = f"""
import copy, pickle
layer = {make}
layer(torch.ones(4, 784)).sum().backward()
with torch.no_grad():  # torch.optim would import torch._dynamo
    layer.weight -= 0.1 * layer.weight.grad
layer.reset_parameters()
other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
other.load_state_dict(layer.state_dict())
assert torch.equal(other(torch.ones(4, 784)), layer(torch.ones(4, 784)))
meta = layer.to("meta").to_empty(device="cpu")
meta.reset_parameters()
assert meta(torch.ones(4, 784)).isfinite().all()
repr(layer)
"""
    assert loaded_by(code) == set()


@direct
def test_fresh_layers_are_put_into_a_model_without_jax():
    code = """
model = torch.nn.Sequential(torch.nn.Linear(16, 8))
torch_bridge.sparsify(model, [(".*", {"kind": "block_diag", "num_blocks": 2})])
model(torch.ones(2, 16)).sum().backward()
"""
    assert loaded_by(code) == set()


KEPT = {
    "blocks": '{"kind": "block_sparse", "density": 0.5, "block": (4, 2)}',
    "entries": '{"kind": "sparse", "density": 0.5}',
    "the diagonal": '{"kind": "block_diag", "num_blocks": 2}',
}


@direct
@pytest.mark.parametrize("rule", mostly_slow(KEPT.values()), ids=KEPT)
def test_a_trained_model_is_made_sparse_called_and_made_dense_again_without_jax(rule):
    code = f"""
model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
print(torch_bridge.sparsify(model, [("0", {rule})], rescale=True), file=sys.stderr)
torch_bridge.sparsify(model, [("1", {{"kind": "sparse", "density": 0.5}})], only_if_faster=True, batch=2)
model(torch.ones(2, 16)).sum().backward()
y = model[0](torch.ones(2, 16))
torch.testing.assert_close(model[0].to_linear()(torch.ones(2, 16)), y)
"""
    assert loaded_by(code) == set()


@direct
def test_a_mask_places_a_layer_without_jax():
    code = """
mask = torch.rand(8, 16) < 0.5
torch_bridge.SparseLinear(16, 8, mask=mask)(torch.ones(2, 16))
torch_bridge.BlockSparseLinear(16, 8, mask=mask, block=2)(torch.ones(2, 16))
layer = torch_bridge.SparseLinear.from_linear(torch.nn.Linear(16, 8), mask=mask)
assert ((layer.to_linear().weight != 0) == mask).all()
"""
    assert loaded_by(code) == set()


def test_the_first_call_through_jax_brings_it_and_no_flax():
    code = """
layer = torch_bridge.SparseLinear(16, 8, density=0.5, backend="xla")
layer(torch.ones(2, 16)).sum().backward()
assert layer.weight.grad is not None
"""
    loaded = loaded_by(code)
    assert "jax" in loaded and "flax" not in loaded


@pytest.mark.slow  # a process that compiles
def test_a_compiled_graph_may_be_the_first_that_takes_the_way_through_jax():
    code = """
layer = torch_bridge.BlockSparseLinear(16, 8, density=0.5, block=4, backend="xla")
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
y = compiled(torch.ones(2, 16))
y.sum().backward()
assert torch.allclose(y, layer(torch.ones(2, 16)))
"""
    assert "jax" in loaded_by(code)


def test_names_are_resolved_at_first_use():
    assert torch_bridge.SparseLinear.__module__ == "torch_bridge.nn"
    assert set(torch_bridge.__all__) <= set(dir(torch_bridge))
    assert all(getattr(torch_bridge, name).__name__ == name for name in torch_bridge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Dense'"):
        _ = torch_bridge.Dense


def imports_at_once(source: str) -> set[str]:
    """The packages that a module imports while it is imported itself."""
    found, left = set(), list(ast.parse(source).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            left += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            left += ast.iter_child_nodes(node)
    return found


LIGHT = ["nn", "patch", "products", "torch_ops", "_dense", "_draw", "_handles", "_index", "_linear", "_matrix"]
LIGHT += ["_layer", "_product", "_stored", "_narrow", "_views", "_watch", "_whole", "_errors", "__init__"]


@pytest.mark.parametrize("name", LIGHT)
def test_what_the_layers_consist_of_imports_jax_late_if_at_all(name):
    source = Path(torch_bridge.__file__).with_name(f"{name}.py").read_text()
    assert not imports_at_once(source) & {"jax", "flax", "optax"}


def test_the_check_sees_an_import_at_once_and_no_other():
    assert imports_at_once("if True:\n    import jax.numpy") == {"jax"}
    assert imports_at_once("if TYPE_CHECKING:\n    import jax\ndef f():\n    import flax") == set()
