"""Imports point down only: the table of the house, held against every import statement in the source."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMERIC = {"jax", "numpy", "jaxtyping"}
BASE = {"jaxsparse._groups", "jaxsparse._indices", "jaxsparse._norms", "jaxsparse._sizes"}
FORMATS = BASE | {"jaxsparse.formats", "jaxsparse.formats.interop"}
FILES = {"jaxsparse.files._limits", "jaxsparse.files.layouts", "jaxsparse.files.weights"}
# What torch.save wrote, torch alone can read; and the top of the house says what torch does where it is installed.
TORCH_COMPETES = "jaxsparse/bench/in_torch.py"  # imported where torch is installed
KNOW_TORCH = {
    "jaxsparse/files/_torch.py": {"torch"},
    "jaxsparse/_devices.py": {"torch"},
    "jaxsparse/models/summary.py": {"torch_bridge.summary"},
    TORCH_COMPETES: {"torch", "torch.nn.functional", "torch_bridge.nn"},
}
OPS = FORMATS | {"jaxsparse.ops"}
PRODUCTS = {"jaxsparse._backends", *(f"jaxsparse.products.{name}" for name in ("_epilogue", "_rules", "_shards"))}
TRAINING = {"jaxsparse.training", *(f"jaxsparse.training.{name}" for name in ("_carry", "_places", "_replicas"))}
CHECKPOINT = {"jaxsparse.checkpoint", "jaxsparse.checkpoint.trees"}
LAYERS = {"flax", "jaxsparse.formats", "jaxsparse.linen", "jaxsparse.nnx"}
MODELS = {
    "jaxsparse.models",
    *(f"jaxsparse.models.{name}" for name in ("_densify", "_layers", "report", "rules", "summary")),
}
COSTS = {
    "jaxsparse.costs",
    *(f"jaxsparse.costs.{name}" for name in ("advising", "explaining", "layers", "machine", "measuring", "model")),
    "jaxsparse.costs.racing",
    "jaxsparse.costs.words",
}
SHOWN = {"jaxsparse._findings", "jaxsparse._matrices", "jaxsparse._picture", "jaxsparse.formats"}
# file -> what it may import beyond the standard library; "scipy" only where a user hands such a matrix in
TABLE = {
    "jaxsparse/__init__.py": {
        "jaxsparse._backends",
        "jaxsparse._devices",
        "jaxsparse._memory",
        "jaxsparse._picture",
        "jaxsparse.models.summary",
        "jaxsparse.formats",
        "jaxsparse.ops",
        "jaxsparse.linen",
        "jaxsparse.nnx",
        "jaxsparse.training.roles",
        "jaxsparse.costs.explaining",
        "jaxsparse.costs.measuring",
    },
    "jaxsparse/_sizes.py": set(),
    "jaxsparse/_arguments.py": {"jaxsparse.formats"},
    "jaxsparse/_norms.py": {"jax", "numpy"},
    "jaxsparse/_groups.py": NUMERIC,
    "jaxsparse/_indices.py": NUMERIC | {"jaxsparse._sizes", "scipy"},
    "jaxsparse/formats/__init__.py": {"jaxsparse.formats.block", "jaxsparse.formats.n_m"},
    "jaxsparse/formats/block.py": NUMERIC
    | BASE
    | FORMATS
    | {"jaxsparse._picture", "jaxsparse.formats._parts", "scipy"},
    "jaxsparse/formats/interop.py": NUMERIC | FORMATS | {"scipy"},
    "jaxsparse/formats/states.py": NUMERIC | FORMATS,
    "jaxsparse/formats/_parts.py": NUMERIC | FORMATS,
    "jaxsparse/formats/n_m.py": NUMERIC | BASE | {"jaxsparse.formats.block"},
    "jaxsparse/reference.py": {"numpy", "jaxsparse.formats"},
    "jaxsparse/_xla.py": NUMERIC | BASE | {"jaxsparse._xla_walk"},
    "jaxsparse/_xla_walk.py": NUMERIC | BASE,
    "jaxsparse/_measured.py": {"jaxsparse._sizes"},
    "jaxsparse/_backends.py": {
        "jax",
        "jaxsparse._measured",
        "jaxsparse._sizes",
        "jaxsparse._xla",
        "cpu_kernels",
        "pallas_kernels",
    },
    "jaxsparse/products/__init__.py": {"jaxsparse.products.block_diag", "jaxsparse.products.sparse"},
    "jaxsparse/products/_shards.py": {"jax", "jaxsparse.products._rules"},
    "jaxsparse/products/_rules.py": NUMERIC | {"jaxsparse._backends", "jaxsparse.products"},
    "jaxsparse/products/_epilogue.py": NUMERIC | PRODUCTS | {"jaxsparse._xla"},
    "jaxsparse/products/sparse.py": NUMERIC | PRODUCTS | BASE,
    "jaxsparse/products/block_diag.py": NUMERIC | PRODUCTS,
    "jaxsparse/products/n_m.py": NUMERIC | PRODUCTS,
    "jaxsparse/exporting.py": {"jax", "cpu_kernels"},
    "jaxsparse/ops.py": NUMERIC | {"jaxsparse.formats", "jaxsparse._backends", "jaxsparse._xla", "jaxsparse.products"},
    "jaxsparse/_flax.py": NUMERIC | FORMATS | {"flax", "jaxsparse._arguments"},
    "jaxsparse/linen.py": NUMERIC | OPS | {"flax", "jaxsparse._arguments", "jaxsparse._flax"},
    "jaxsparse/nnx.py": NUMERIC | OPS | {"flax", "jaxsparse._arguments", "jaxsparse._flax"},
    "jaxsparse/costs/__init__.py": set(),
    "jaxsparse/costs/racing.py": set(),
    "jaxsparse/costs/words.py": set(),
    "jaxsparse/costs/layers.py": {"jaxsparse._sizes"},
    "jaxsparse/costs/machine.py": COSTS,
    "jaxsparse/costs/model.py": COSTS,
    "jaxsparse/costs/measuring.py": {"jaxsparse._sizes"} | COSTS,
    "jaxsparse/costs/advising.py": COSTS,
    "jaxsparse/costs/explaining.py": COSTS,
    "jaxsparse/cli/explain.py": {"typer", "jaxsparse.cli._output"} | COSTS,
    "jaxsparse/costs/_in_jax.py": NUMERIC | FORMATS | {"optax", "jaxsparse.ops", "jaxsparse.costs.layers"},
    "jaxsparse/surgery.py": MODELS | {"jaxsparse.models.in_linen", "jaxsparse.models.in_nnx"},
    "jaxsparse/models/__init__.py": set(),
    "jaxsparse/models/rules.py": {"jaxsparse._sizes"},
    "jaxsparse/models/report.py": {"jaxsparse.costs.racing"} | MODELS,
    "jaxsparse/models/_kept.py": NUMERIC | {"jaxsparse._arguments", "jaxsparse.formats"} | MODELS,
    "jaxsparse/models/_races.py": {"jax", "flax", "jaxsparse.costs.racing"} | MODELS,
    "jaxsparse/models/_densify.py": NUMERIC | LAYERS | MODELS | {"jaxsparse._xla"},
    "jaxsparse/models/_layers.py": NUMERIC | LAYERS | MODELS,
    "jaxsparse/models/in_nnx.py": NUMERIC | LAYERS | MODELS | {"jaxsparse._norms", "jaxsparse.costs.racing"},
    "jaxsparse/models/in_linen.py": NUMERIC | LAYERS | MODELS | {"jaxsparse._norms", "jaxsparse.costs.racing"},
    "jaxsparse/models/summary.py": {"rich", "jaxsparse._text", "torch_bridge.summary"} | MODELS,
    "jaxsparse/models/_summary_flax.py": {"jax", "jaxsparse._sizes"} | LAYERS | MODELS,
    "jaxsparse/pruning.py": {"jaxsparse.training.pruning"},
    "jaxsparse/dynamic.py": {"jaxsparse.training.dynamic"},
    "jaxsparse/training/__init__.py": set(),
    "jaxsparse/training/_select.py": NUMERIC,
    "jaxsparse/training/_places.py": NUMERIC | FORMATS | TRAINING,
    "jaxsparse/training/_replicas.py": {"jax"},
    "jaxsparse/training/_carry.py": NUMERIC | TRAINING,
    "jaxsparse/training/pruning.py": NUMERIC | {"jaxsparse._norms", "jaxsparse._sizes", "optax"} | TRAINING,
    "jaxsparse/training/dynamic.py": NUMERIC | FORMATS | TRAINING,
    "jaxsparse/training/roles.py": {"jax"} | FORMATS,
    "jaxsparse/convert.py": {"numpy", "jaxtyping", "jaxsparse._norms", "jaxsparse.formats"},
    "jaxsparse/checkpoint/__init__.py": NUMERIC | {"jaxsparse.formats"} | CHECKPOINT,
    "jaxsparse/checkpoint/targets.py": NUMERIC | FORMATS | CHECKPOINT,
    "jaxsparse/checkpoint/trees.py": NUMERIC | FORMATS,
    "jaxsparse/files/__init__.py": {"numpy", "safetensors", "jaxsparse.files", "jaxsparse.files.weights"},
    "jaxsparse/files/_limits.py": set(),
    "jaxsparse/files/_npz.py": {"numpy", "scipy", "jaxsparse.formats"} | FILES,
    "jaxsparse/files/_text.py": {"numpy"} | FORMATS | FILES,
    "jaxsparse/files/layouts.py": {"numpy", "jaxsparse._indices", "jaxsparse._sizes", "jaxsparse.formats"},
    "jaxsparse/files/_torch.py": {"jax", "numpy", "torch", "jaxsparse.files"} | FILES,
    "jaxsparse/files/weights.py": NUMERIC | FORMATS,
    "jaxsparse/_text.py": {"rich"},
    "jaxsparse/_memory.py": set(),
    "jaxsparse/_devices.py": {"jax", "torch", "cpu_kernels", "jaxsparse._backends", "jaxsparse._measured"}
    | {"jaxsparse._devices_table", "jaxsparse._text"},
    "jaxsparse/_devices_table.py": {"rich", "jaxsparse._devices", "jaxsparse._measured"},
    "jaxsparse/_picture.py": {"jax", "numpy", "matplotlib", "jaxsparse.formats"},
    "jaxsparse/_matrices.py": {"jax", "numpy", "orbax", "etils", "jaxsparse.checkpoint", "jaxsparse.files"} | FORMATS,
    "jaxsparse/_findings.py": {"numpy", "jaxsparse._matrices", "jaxsparse._norms", "jaxsparse.formats"},
    "jaxsparse/__main__.py": {"jaxsparse.cli"},
    "jaxsparse/cli/__init__.py": {"typer"},
    "jaxsparse/cli/_output.py": {"rich", "matplotlib"},
    "jaxsparse/cli/devices.py": {"typer", "jaxsparse._devices", "jaxsparse.cli._output"},
    "jaxsparse/bench/__init__.py": set(),
    "jaxsparse/bench/grid.py": NUMERIC | {"jaxsparse.formats"},
    "jaxsparse/bench/in_jax.py": NUMERIC | {"jaxsparse.bench.grid", "jaxsparse.ops"},
    TORCH_COMPETES: {"jax", "numpy", "torch", "torch_bridge.nn", "sparselab"}
    | {"jaxsparse.bench.grid", "jaxsparse.bench.in_jax"},
    "jaxsparse/bench/running.py": {
        "numpy",
        "jaxsparse.bench.grid",
        "jaxsparse.costs._in_jax",
        "jaxsparse.costs.racing",
    },
    "jaxsparse/cli/bench.py": {"typer", "jaxsparse.bench", "jaxsparse.cli"},
    "jaxsparse/cli/_bench.py": {"rich", "matplotlib", "jaxsparse.devices", "jaxsparse.bench"}
    | {"jaxsparse.bench.grid", "jaxsparse.bench.running"},
    "jaxsparse/cli/show.py": {"typer", "jaxsparse._findings", "jaxsparse._matrices"} | {"jaxsparse.cli"},
    "jaxsparse/cli/_show.py": {"rich", "jaxsparse.cli"} | SHOWN,
    "jaxsparse/cli/_show_plot.py": {"numpy", "matplotlib"} | SHOWN,
    "jaxsparse/testing.py": NUMERIC | {"jaxsparse.formats", "jaxsparse.reference"},
}
PACKAGES = {"jaxsparse", "torch_bridge"}
FOREIGN = {"torch", "jax", "numpy", "flax"}
BRIDGE = {
    "__init__.py": {"_errors", "dlpack", "function", "module", "nn", "torch_ops", "patch", "roles"},
    "_compressed.py": {"dlpack"},
    "costs.py": {"nn", "products"},
    "_dense.py": set(),
    "_linear.py": {"_dense", "_watch"},
    "_handles.py": set(),
    "_in_jax.py": {"_product", "dlpack", "function"},
    "_stored.py": {"_dense", "_draw", "dlpack"},
    "_views.py": set(),
    "_errors.py": set(),
    "_flops.py": set(),
    "_index.py": {"_watch", "_whole"},
    "_process.py": {"_errors"},
    "_draw.py": set(),
    "_matrix.py": {"_memory", "_narrow"},
    "_memory.py": set(),
    "_narrow.py": set(),
    "_portable.py": {"_matrix"},
    "exporting.py": {"_matrix", "_portable", "torch_ops"},
    "products.py": {"_matrix", "_portable", "_watch"},
    "torch_ops.py": {"_matrix", "_watch", "products"},
    "_product.py": {"_handles", "_in_jax", "_views", "_whole", "compile", "function"},
    "_whole.py": set(),
    "checkpoint.py": set(),
    "roles.py": {"nn"},
    "summary.py": {"_linear", "nn"},
    "dlpack.py": {"_errors", "_process", "_views", "_watch"},
    "flat_op.py": set(),
    "abstract.py": {"_errors", "_watch"},
    "_watch.py": {"_errors"},
    "operator.py": {"_errors", "_flops", "_views", "_watch", "abstract", "dlpack", "flat_op"},
    "autograd.py": {"_views", "_watch", "dlpack", "flat_op", "operator"},
    "compile.py": {"_errors", "_handles"},
    "function.py": {
        "_errors",
        "_handles",
        "_views",
        "_watch",
        "autograd",
        "compile",
        "dlpack",
        "flat_op",
        "operator",
    },
    "_linen.py": {"_errors"},
    "_nnx.py": {"_errors", "_linen"},
    "model.py": {
        "_handles",
        "_linen",
        "_nnx",
        "_views",
        "_watch",
        "abstract",
        "autograd",
        "compile",
        "flat_op",
        "function",
        "operator",
    },
    "module.py": {"_errors", "_linen", "_nnx", "_views", "_watch", "dlpack", "model"},
    "dynamic.py": {"dlpack", "nn"},
    "nn.py": {
        "_compressed",
        "_dense",
        "_draw",
        "_in_jax",
        "_index",
        "_layer",
        "_linear",
        "_matrix",
        "_product",
        "_stored",
        "_views",
        "_watch",
    },
    "patch.py": {"_linear", "hugging_face", "nn"},
    "hugging_face.py": {"_linear", "nn", "patch"},
    "lora.py": {"nn"},
    "_layer.py": {"_matrix", "_views", "_watch", "products"},
}
SPARSE = {  # only the layers, and what makes or places them, know jaxsparse
    "_compressed.py": {"jaxsparse.files", "jaxsparse.files.layouts", "jaxsparse.formats"},
    "_matrix.py": {"cpu_kernels", "jaxsparse._sizes"},
    "_dense.py": {"jaxsparse._sizes", "jaxsparse.formats"},
    "checkpoint.py": CHECKPOINT,
    "_in_jax.py": {"jaxsparse._indices", "jaxsparse.formats", "jaxsparse.ops"},
    "_stored.py": {"jaxsparse._arguments", "jaxsparse._norms", "jaxsparse._sizes", "jaxsparse.formats"},
    "dynamic.py": {"jaxsparse.dynamic"},
    "nn.py": {"jaxsparse._arguments", "jaxsparse._sizes", "jaxsparse.formats"},
    "costs.py": {"jaxsparse.costs.layers"},
    "patch.py": {"jaxsparse.models.report", "jaxsparse.models.rules", "jaxsparse.costs.racing"},
    "summary.py": {"jaxsparse.models.summary"},
    "hugging_face.py": {"jaxsparse.models.rules", "jaxsparse._sizes"},
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from jaxsparse import x` as jaxsparse.x."""
    return names_of(ast.walk(ast.parse(path.read_text())), path)


def imported_at_once(path: Path) -> set[str]:
    """Those at the top of a file."""
    return names_of(ast.parse(path.read_text()).body, path)


def names_of(nodes: Iterable[ast.AST], path: Path) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            names |= {f"{module}.{a.name}" for a in node.names} if module in PACKAGES else {module}
    return names


def allowed(name: str, table: set[str]) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or name in table or (top != "jaxsparse" and top in table)


SOURCES = sorted(ROOT.glob("jaxsparse/**/*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    table = TABLE[str(path.relative_to(ROOT))]
    assert not {name for name in imported(path) if not allowed(name, table)}


def test_the_table_names_only_files_that_exist():
    assert {str(p.relative_to(ROOT)) for p in SOURCES} == set(TABLE)


@pytest.mark.parametrize("path", sorted(ROOT.glob("torch_bridge/*.py")), ids=lambda p: p.name)
def test_the_bridge_imports_downwards(path):
    table = {f"torch_bridge.{name}" for name in BRIDGE[path.name]} | SPARSE.get(path.name, set())
    own = {"hugging_face.py": {"transformers"}, "lora.py": {"peft"}}.get(path.name, set())
    names = {name for name in imported(path) if name.split(".")[0] not in FOREIGN | own | sys.stdlib_module_names}
    assert names <= table


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_kernels/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_format(path):
    own = path.relative_to(ROOT).parts[0]
    assert {name.split(".")[0] for name in imported(path)} <= {"jax", "numpy", own} | sys.stdlib_module_names


def test_the_dialects_know_nothing_of_each_other():
    for dialect, other in (("triton", "mosaic"), ("mosaic", "triton")):
        for path in ROOT.glob(f"pallas_kernels/{dialect}/*.py"):
            assert not {name for name in imported(path) if name.startswith(f"pallas_kernels.{other}")}, path


def test_nothing_below_imports_torch():
    for path in SOURCES:
        foreign = {n for n in imported(path) if n.split(".")[0] in ("torch", "torch_bridge")}
        assert foreign == KNOW_TORCH.get(str(path.relative_to(ROOT)), set()), path
        if str(path.relative_to(ROOT)) == TORCH_COMPETES:
            continue
        assert not {n for n in imported_at_once(path) if n.split(".")[0] in ("torch", "torch_bridge")}, path


def test_a_command_imports_typer_alone_before_it_runs():
    for path in ROOT.glob("jaxsparse/cli/[!_]*.py"):
        assert all(allowed(name, {"typer"}) for name in imported_at_once(path)), path


def test_the_check_sees_a_forbidden_import():
    assert not allowed("jaxsparse.ops", TABLE["jaxsparse/formats/block.py"])
    assert not allowed("flax.linen", TABLE["jaxsparse/ops.py"])
    assert allowed("jax.numpy", TABLE["jaxsparse/ops.py"])


def test_one_door_leads_into_a_pattern_past_its_checks():
    own = "jaxsparse/formats/block.py"
    paths = [*SOURCES, *ROOT.glob("torch_bridge/*.py")]
    others = {str(p.relative_to(ROOT)) for p in paths if re.search(r"BlockPattern(\.tree_unflatten)?\(", p.read_text())}
    assert others == {own}  # that is `of_index`
