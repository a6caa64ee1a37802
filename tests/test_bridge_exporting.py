"""Models that leave: dense ones, ONNX files, and programs of torch.export that run where this library is not."""

import copy
import io
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import jax  # noqa: E402

from jaxsparse import BlockPattern  # noqa: E402
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, densify, exporting  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own


def transposed(**options):
    pattern = BlockPattern.random(jax.random.key(0), (10, 13), density=0.4, block=(4, 3)).T
    return BlockSparseLinear(13, 10, pattern=pattern, **options)


def empty(**options):
    pattern = BlockPattern.random(jax.random.key(0), (13, 10), density=0)
    return SparseLinear(13, 10, pattern=pattern, **options)


LAYERS = {
    "entries": lambda **o: SparseLinear(13, 10, 0.3, **o),
    "blocks that do not divide": lambda **o: BlockSparseLinear(13, 10, 0.5, (3, 4), **o),
    "transposed": transposed,
    "empty": empty,
    "diagonal": lambda **o: BlockDiagLinear(12, 8, 4, **o),
    "through JAX": lambda **o: SparseLinear(13, 10, 0.3, backend="xla", **o),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_activation = pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])


def run_onnx(program, x):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def export_onnx(model, x, **options):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, **options)


# ---- dense -------------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_model_computes_the_same_and_has_no_layer_of_ours(name, dtype):
    layer = LAYERS[name](activation="silu", dtype=dtype)
    model = torch.nn.ModuleList([layer, torch.nn.Sequential(layer), LAYERS[name](bias=False, dtype=dtype)]).eval()
    sparse = copy.deepcopy(model)
    assert densify(model) is model and not any("torch_bridge" in type(m).__module__ for m in model.modules())
    assert model[0] is model[1][0] and not model[0].training  # what was shared is shared still
    x = torch.randn(5, layer.in_features, dtype=dtype)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for dense, old in zip(model, sparse, strict=True):
        torch.testing.assert_close(dense(x), old(x), **near)


@each_activation
def test_a_layer_by_itself_becomes_dense_with_its_activation(activation):
    layer = SparseLinear(13, 10, 0.3, activation=activation)
    dense, x = densify(layer), torch.randn(5, 13)
    assert isinstance(dense[0], torch.nn.Linear)
    torch.testing.assert_close(dense(x), layer(x))


# ---- ONNX --------------------------------------------------------------------------------------------------


class Every(torch.nn.Module):
    """All kinds of layers side by side, with all activations and none: one export takes seconds."""

    def __init__(self):
        super().__init__()
        options = [{"activation": name, "bias": name != "silu"} for name in ("relu", "gelu", "silu")]
        many = {f"{name} {k}": make(**given) for name, make in LAYERS.items() for k, given in enumerate(options)}
        self.layers = torch.nn.ModuleDict({**many, **{name: make() for name, make in LAYERS.items()}})

    def forward(self, x):
        return [layer(x[..., : layer.in_features]) for layer in self.layers.values()]


@pytest.mark.slow  # every layer, through an exporter that takes long
def test_an_onnx_file_runs_without_us_at_other_batch_sizes():
    model, batch = Every(), ({0: torch.export.Dim("batch", min=2)},)
    program = export_onnx(model, torch.randn(3, 2, 13), dynamic_shapes=batch)
    assert {node.domain for node in program.model.graph} == {""}  # the operators of ONNX itself
    x = torch.randn(7, 2, 13)
    for name, y, truth in zip(model.layers, run_onnx(program, x), model(x), strict=True):
        torch.testing.assert_close(y, truth.detach(), msg=lambda text, name=name: f"{name}: {text}")


def test_an_onnx_file_holds_what_is_stored_and_not_the_zeros():
    layer, file, x = SparseLinear(256, 256, 0.05), io.BytesIO(), torch.randn(2, 256)
    program = export_onnx(layer, x)
    program.save(file)
    assert len(file.getvalue()) < 256 * 256 * 4 / 3
    torch.testing.assert_close(run_onnx(program, x)[0], layer(x).detach())


# ---- torch.export ------------------------------------------------------------------------------------------


def test_a_decomposed_program_has_no_operator_of_ours():
    model, sizes = Every(), ({0: torch.export.Dim("batch", min=2)},)
    for name in [name for name in model.layers if "JAX" in name]:  # those are another operator, which needs us
        del model.layers[name]
    program = torch.export.export(model, (torch.randn(3, 13),), dynamic_shapes=sizes)
    assert "jaxsparse" in str(program.graph)
    program = program.run_decompositions(exporting.decompositions())
    assert "jaxsparse" not in str(program.graph)
    x = torch.randn(7, 13)
    for name, y, truth in zip(model.layers, program.module()(x), model(x), strict=True):
        torch.testing.assert_close(y, truth, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow  # a process of its own
def test_a_decomposed_program_runs_in_a_process_without_us_and_as_onnx(tmp_path):
    model = torch.nn.Sequential(SparseLinear(13, 12, 0.3, activation="gelu"), BlockDiagLinear(12, 8, 4))
    x = torch.randn(3, 13)
    program = torch.export.export(model, (x,)).run_decompositions(exporting.decompositions())
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, model(x)), tmp_path / "x_and_y")
    code = f"""
import sys, torch
x, y = torch.load({str(tmp_path / "x_and_y")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "program.pt2")!r}).module()(x), y)
assert not {{"jaxsparse", "torch_bridge", "jax"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.testing.assert_close(run_onnx(torch.onnx.export(program, verbose=False), x)[0], model(x).detach())
