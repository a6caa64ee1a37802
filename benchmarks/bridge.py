"""What a call from torch into JAX costs on this CPU, beside torch and other bridges: python benchmarks/bridge.py.

Two workloads, forward and backward with a given upstream gradient: a 32x32 layer on a batch of 8, where there is
nothing but overhead, and an MLP of four 1024-wide layers on a batch of 64. "The least bridge" is the least code that
calls JAX from an autograd.Function: what it costs beyond torch's own is JAX's. All contenders of a workload take turns
in one process (`_measure.py`). There is one such process for each of `SETTINGS`, as JAX decides at its start whether
it computes on a thread of its own (its default) or in the thread that waits for it, and torch's OpenMP whether idle
threads spin or sleep. A contender that fails, or is wrong, is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _measure
from torch_bridge import BlockDiagLinear, from_flax, jax2torch

PACKAGES = ("jax", "torch", "flax", "jax2torch", "torch-jax-interop")
FUNCTION = "torch autograd.Function"
LEAST = "the least bridge"
HERE, ASLEEP = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}, {"OMP_WAIT_POLICY": "PASSIVE"}
SETTINGS: dict[str, dict[str, str]] = {
    "defaults": {},
    "JAX in the calling thread": HERE,
    "torch's idle threads sleep": ASLEEP,
    "both": HERE | ASLEEP,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a short run, to see that everything runs")
    parser.add_argument("--out", default="benchmarks/results/bridge.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one process of several
    args = parser.parse_args()
    if args.here:
        print(json.dumps(_measure_all(args.quick)))
        return
    runs = {}
    for name, setting in SETTINGS.items():
        command = [sys.executable, __file__, "--here", *(["--quick"] if args.quick else [])]
        done = subprocess.run(command, env=os.environ | setting, stdout=subprocess.PIPE, text=True, check=True)
        runs[name] = json.loads(done.stdout.splitlines()[-1])
        _print(f"{name}: {' '.join('='.join(each) for each in setting.items())}", runs[name])
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": _measure.machine(PACKAGES), "runs": runs}, indent=1) + "\n")
    print(f"numbers: {out}")


def _measure_all(quick: bool) -> dict:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    workloads = {}
    for name, (builders, truth) in {"layer 32x32, batch 8": _layer(), "MLP 4 x 1024, batch 64": _mlp()}.items():
        seconds = 0.1 if quick else 6.0
        with _measure.Load() as load:
            results = _measure.measure(builders, truth, seconds, longest=1.0, keep=tuple(builders))
        numbers = {n: {"us": r.ms and 1e3 * r.ms, "note": r.note} for n, r in results.items()}
        workloads[name] = {"load_of_others": load.of_others, "results": numbers}
    return workloads


def _layer() -> tuple[dict, np.ndarray]:
    """Each contender is a function of (x, w, b) -> y; a call returns the gradient of w."""
    torch.manual_seed(0)
    x, cotangent = torch.randn(8, 32), torch.randn(8, 32)
    w, b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 32), (32,)))

    def affine(x, w, b):
        return x @ w + b

    def module(make):  # a contender with parameters of its own
        made = make()
        weights = sorted(made.parameters(), key=lambda p: -p.numel())
        return lambda: _step(lambda: made(x), weights, cotangent).reshape(32, 32)

    def function(make):
        f = make()
        return lambda: _step(lambda: f(x, w, b), [w, b], cotangent)

    arrays = {"bias": jnp.array(b.detach()), "kernel": jnp.array(w.detach())}

    def transposed(call):  # torch.nn.Linear keeps its weight (out, in)
        return lambda: call().T

    def jax2torch_of_pypi():
        from jax2torch import jax2torch as other

        return other(jax.jit(affine))

    def interop():
        from torch_jax_interop import WrappedJaxFunction

        return WrappedJaxFunction(jax.jit(lambda p, x: affine(x, p["kernel"], p["bias"])), arrays)

    builders = {
        FUNCTION: lambda: function(lambda: _Affine.apply),
        "torch Linear": lambda: transposed(module(lambda: torch.nn.Linear(32, 32))),
        LEAST: lambda: function(lambda: _least_bridge(affine)),
        "ours: jax2torch": lambda: function(lambda: jax2torch(affine)),
        "ours: from_flax": lambda: module(lambda: from_flax(linen.Dense(32), {"params": arrays})),
        "ours: BlockDiagLinear": lambda: module(lambda: BlockDiagLinear(32, 32, 1)),
        "jax2torch": lambda: function(jax2torch_of_pypi),
        "torch-jax-interop": lambda: module(interop),
    }
    return builders, (x.T @ cotangent).numpy()


def _mlp() -> tuple[dict, np.ndarray]:
    torch.manual_seed(0)
    x, cotangent = torch.randn(64, 1024), torch.randn(64, 1024) / 1024
    native = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(1024, 1024), torch.nn.GELU("tanh"))])

    class MLP(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(4):
                x = linen.gelu(linen.Dense(1024)(x))
            return x

    layers = [m for m in native if isinstance(m, torch.nn.Linear)]
    arrays = {
        f"Dense_{i}": {"kernel": jnp.array(layer.weight.detach().T), "bias": jnp.array(layer.bias.detach())}
        for i, layer in enumerate(layers)
    }
    flax = from_flax(MLP(), {"params": arrays})
    first = flax.get_parameter("params.Dense_0.kernel")
    ours = [first, *[p for p in flax.parameters() if p is not first]]
    builders = {
        "torch": lambda: lambda: _step(lambda: native(x), list(native.parameters()), cotangent).T,
        "ours: from_flax": lambda: lambda: _step(lambda: flax(x), ours, cotangent),
        "ours, after a torch operator": lambda: lambda: _step(lambda: flax(x + 0), ours, cotangent),
    }
    native(x).backward(cotangent)
    assert layers[0].weight.grad is not None
    return builders, layers[0].weight.grad.T.numpy().copy()


class _Affine(torch.autograd.Function):
    """The least that torch itself needs for an operator with a derivative rule in Python."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return torch.addmm(b, x, w)

    @staticmethod
    def backward(ctx, dy):
        x, _ = ctx.saved_tensors
        return None, x.T @ dy, dy.sum(0)


def _least_bridge(fn):
    """What any bridge pays: a jitted function and its jitted pullback in an autograd.Function, with nothing checked."""
    forward = jax.jit(fn)
    pullback = jax.jit(lambda x, w, b, dy: jax.vjp(lambda w, b: fn(x, w, b), w, b)[1](dy))

    class Least(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w, b)
            return torch.from_dlpack(forward(x.numpy(), w.numpy(), b.numpy()).__dlpack__())

        @staticmethod
        def backward(ctx, dy):
            gradients = pullback(*[t.detach().numpy() for t in (*ctx.saved_tensors, dy)])
            return None, *[torch.from_dlpack(g.__dlpack__()) for g in gradients]

    return Least.apply


def _step(forward, parameters: list, cotangent: torch.Tensor) -> torch.Tensor:
    """One forward and backward pass; the gradient of the first parameter."""
    for p in parameters:
        p.grad = None
    forward().backward(cotangent)
    return parameters[0].grad


def _print(title: str, workloads: dict) -> None:
    print(f"\n== {title}; us a forward and backward pass, median of the rounds")
    for name, workload in workloads.items():
        print(f"{name}; cores busy with other processes: {workload['load_of_others']}")
        base = workload["results"].get(FUNCTION, {}).get("us")
        for contender, r in workload["results"].items():
            over = "" if base is None or r["us"] is None else f"{r['us'] - base:+10.0f} over {FUNCTION}"
            print(f"  {contender:26s}{r['note'] if r['us'] is None else format(r['us'], '10.0f')}{over}")


if __name__ == "__main__":
    main()
