"""What one would write in torch in place of our layers, as modules; each is checked against the layer it stands for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud, or it warns
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

Makers = dict[str, Callable[[], nn.Module]]


def block_diagonal(layer: Any) -> Makers:
    """Six ways to the product of a BlockDiagLinear."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    n, i, o = weight.shape

    def loop(m, x):
        parts = x.chunk(n, -1)
        return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, m.weights, m.biases, strict=True)], -1)

    def baddbmm(m, x):
        by_block = x.view(-1, n, i).transpose(0, 1)
        return torch.baddbmm(m.bias, by_block, m.weight).transpose(0, 1).reshape(*x.shape[:-1], n * o)

    def einsum(m, x):
        return (torch.einsum("bni,nio->bno", x.view(-1, n, i), m.weight) + m.bias).flatten(1)

    def conv1d(m, x):
        return F.conv1d(x[:, :, None], m.weight, m.bias, groups=n)[:, :, 0]

    def joined(m, x):
        return F.linear(x, torch.block_diag(*m.weights), m.bias)

    ways: dict[str, tuple[Callable, Callable[[], dict]]] = {
        "loop of Linear": (loop, lambda: {"weights": list(weight.mT), "biases": list(bias.view(n, o))}),
        "baddbmm": (baddbmm, lambda: {"weight": weight, "bias": bias.view(n, 1, o)}),
        "einsum": (einsum, lambda: {"weight": weight, "bias": bias.view(n, o)}),
        "grouped conv1d": (conv1d, lambda: {"weight": weight.mT.reshape(n * o, i, 1), "bias": bias}),
    }
    if 4 * n * i * n * o < 3e8:
        ways["block_diag"] = joined, lambda: {"weights": list(weight.mT), "bias": bias}
    return {name: _maker(layer, *way) for name, way in ways.items()}


def sparse(layer: Any) -> Makers:
    """nn.Linear with the zeros stored; torch's CSR where entries are single; SparseLab where it is installed."""
    linear = layer.to_linear()
    makers: Makers = {"nn.Linear": lambda: linear}
    if not layer.pattern.is_unstructured:
        return makers
    ptr, index, shape = layer.col_ptr, layer.row_index, (layer.out_features, layer.in_features)

    def csr(m, x):
        return torch.sparse.mm(torch.sparse_csr_tensor(ptr, index, m.values, shape), x.t()).t() + m.bias

    makers["torch CSR"] = _maker(layer, csr, lambda: {"values": layer.weight.detach(), "bias": layer.bias.detach()})
    return makers | {"SparseLab": lambda: _sparselab(layer, linear)}


def overhead(layer: Any) -> Makers:
    """torch's own layer, and a node of the graph that computes nothing."""
    x = layer.weight.detach()[0].T.contiguous()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, *cotangents):
            _, w = ctx.saved_tensors
            return cotangents[0], w, cotangents[0][0]

    nothing = _Way(lambda m, x: Nothing.apply(x, m.weight, m.bias), {"weight": x, "bias": layer.bias.detach()})
    return {"nn.Linear": layer.to_linear, "an autograd.Function of nothing": lambda: nothing}


class GatedMLP(nn.Module):
    """The MLP of a Llama-like decoder."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def roberta(quick: bool) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    sizes = tiny if quick else {"num_attention_heads": 12, "num_hidden_layers": 6}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=514, type_vocab_size=1, **sizes)
    return RobertaModel(config, add_pooling_layer=False).eval()


def roberta_rules(density: float) -> list:
    options = {"kind": "block_sparse", "density": density, "block": 32}
    names = (r"intermediate\.dense", r"output\.dense", r"attention\.output\.dense")
    return [(rf"encoder\.layer\.[0-9]+\.{name}", options) for name in names]


class _Way(nn.Module):
    """A function of (module, x), with parameters of its own."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], tensors: dict[str, Any]):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            made = [nn.Parameter(t.clone().contiguous()) for t in (value if isinstance(value, list) else [value])]
            setattr(self, name, nn.ParameterList(made) if isinstance(value, list) else made[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _maker(layer: nn.Module, function: Callable, tensors: Callable[[], dict]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made, x = _Way(function, tensors()), torch.randn(4, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(made(x), layer(x), rtol=1e-3, atol=1e-3)
        return made

    return make


def _sparselab(layer: Any, linear: nn.Linear) -> nn.Module:
    import sparselab

    density = layer.density
    made = sparselab.SparseLinear(layer.in_features, layer.out_features, bias=False, sparsity=1 - density)
    made._csr = sparselab.PaddedCSR.from_dense(linear.weight.detach(), padding_ratio=made.padding_ratio)
    made._values = nn.Parameter(torch.from_numpy(np.asarray(made._csr.values)))
    return made
