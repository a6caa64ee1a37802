"""Which way a layer's product takes, by the one rule, and who says so."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from profiles import PROFILE

import jaxsparse
from cpu_kernels import _library, direct
from jaxsparse import _devices
from jaxsparse.costs import machine
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, _product, products

LAYERS = {
    "block-diagonal": lambda **kw: BlockDiagLinear(12, 8, 2, **kw),
    "block-diagonal, torch's own": lambda **kw: BlockDiagLinear(256, 256, 2, **kw),
    "block-sparse": lambda **kw: BlockSparseLinear(12, 8, 0.5, (4, 2), **kw),
    "unstructured": lambda **kw: SparseLinear(12, 8, 0.4, **kw),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
MISSING = "libjaxsparse_cpu.so was not built. Install a C++17 compiler."


@pytest.fixture
def through_jax(monkeypatch):
    """Whether each call that follows went through JAX."""
    calls, call = [], _product.ThroughJax.__call__
    monkeypatch.setattr(_product.ThroughJax, "__call__", lambda *given: calls.append(1) or call(*given))
    return calls


@each_layer
@pytest.mark.parametrize(
    "backend, reason", [(None, None), ("cpu", None), ("xla", None), (None, MISSING), ("cpu", MISSING)]
)
def test_one_rule_decides_the_way_and_both_compute_the_same(make, reason, backend, through_jax, monkeypatch):
    if products.WHY_NOT and not reason:
        pytest.skip(f"there is one way here: {products.WHY_NOT}")
    layer = make(backend=backend)
    x, dense = torch.randn(3, layer.in_features), layer.to_linear()
    monkeypatch.setattr(products, "WHY_NOT", reason)
    y = layer(x)
    assert len(through_jax) == (backend == "xla" or reason is not None)
    torch.testing.assert_close(y, dense(x))
    got, want = (torch.autograd.grad(f(x).square().sum(), f.bias)[0] for f in (layer, dense))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lacks", ["library", "table", "team"])
def test_where_something_is_missing_devices_says_so_and_what_to_do(lacks, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    if lacks == "library":
        _library.why_not_opened.cache_clear()
        monkeypatch.setattr(_library, "library_file", lambda: None)
    elif lacks == "table":
        monkeypatch.setattr(direct, "_missing_in", lambda torch: "DLPack exchange table")
    else:
        monkeypatch.setattr(direct, "_torch_library", lambda torch: None)
    try:
        found = _devices._torch()
    finally:
        _library.why_not_opened.cache_clear()
    if lacks == "library":
        assert found.cpu.startswith("through JAX: libjaxsparse_cpu.so was not built. Install a C++17 compiler")
    else:
        assert (
            found.cpu.startswith("through JAX: torch 2.9.1 has no ") and found.remedy == "Install torch 2.10 or newer."
        )


@pytest.mark.skipif(products.WHY_NOT is not None, reason=f"goes through JAX: {products.WHY_NOT}")
def test_devices_says_that_layers_go_straight_to_the_kernels():
    assert "straight to the C++ kernels" in _devices._torch().cpu and "straight to the" in repr(jaxsparse.devices())


def test_explain_says_why_layers_go_through_jax(monkeypatch):
    in_torch = dataclasses.replace(PROFILE, framework="torch")
    monkeypatch.setattr(machine, "profile", lambda torch=False: in_torch if torch else PROFILE)
    for reason in (None, MISSING):
        monkeypatch.setattr(products, "WHY_NOT", reason)
        found, in_jax = (jaxsparse.explain(64, 64, 8, 0.5, torch=torch) for torch in (True, False))
        said = "Sparse layers go through JAX here: libjaxsparse_cpu.so was not built. Install a C++17 compiler."
        assert (said in " ".join(str(found).split())) == (reason is not None)
        assert found.as_dict()["through_jax"] == reason and in_jax.as_dict()["through_jax"] is None
        assert "through JAX" not in str(in_jax)
