"""The bridge on an NVIDIA GPU: stream order, devices and memory. Everything else is tested on the CPU."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch

from torch_bridge import SparseLinear, jax2torch, torch_to_jax

HAS_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="torch and JAX do not both have a GPU here"),
    pytest.mark.filterwarnings("ignore:JAX reserves three quarters"),
]
N = 2048


def busy(x):
    """Keeps a stream busy for some milliseconds, and leaves x as it was."""
    for _ in range(20):
        x = x @ torch.eye(N, device=x.device)
    return x


def test_values_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    layer, x = SparseLinear(64, 48, 0.2), torch.randn(8, 64)
    layer(x).square().sum().backward()
    on_cpu = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.cuda()(x.cuda()).square().sum().backward()
    for p, want in zip(layer.parameters(), on_cpu, strict=True):
        torch.testing.assert_close(p.grad.cpu(), want, atol=1e-4, rtol=1e-4)


def test_jax_waits_for_torchs_current_stream_and_torch_for_jax():
    f, stream = jax2torch(lambda x: x + 1), torch.cuda.Stream()
    x = torch.zeros(N, N, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for step in range(5):
            x.copy_(busy(torch.full_like(x, float(step))))
            y = f(x)
            x.fill_(-1.0)  # ordered after JAX has read x
            assert torch.equal(y.cpu(), torch.full((N, N), step + 1.0))


def test_a_kept_view_of_a_parameter_sees_the_optimizers_last_step():
    layer, x = SparseLinear(N, N, 0.01, bias=False, device="cuda"), torch.ones(1, N, device="cuda")
    layer(x)
    with torch.no_grad():
        for value in (1.0, 2.0):
            layer.weight.copy_(busy(torch.full((N, N), value, device="cuda")).flatten()[: layer.weight.numel()])
            torch.testing.assert_close(layer(x).sum().cpu(), torch.tensor(value * layer.weight.numel()))


def test_memory_that_is_freed_after_a_call_is_not_overwritten_under_jax():
    def slow(x):
        return jax.lax.fori_loop(0, 20, lambda i, a: a @ jnp.eye(N), x).sum()

    f = jax2torch(slow)
    for _ in range(5):
        x = torch.ones(N, N, device="cuda")
        y = f(x)
        del x
        torch.full((N, N), 7.0, device="cuda")  # takes the memory of x
        assert y.item() == N * N


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_device_that_is_not_current_works_and_stays_not_current():
    x = torch.ones(4, device="cuda:1", requires_grad=True)
    y = jax2torch(lambda x: x * 3)(x)
    y.sum().backward()
    assert y.device == x.grad.device == x.device and torch.cuda.current_device() == 0
    assert torch_to_jax(x.detach()).devices() == {jax.devices()[1]}
