"""The bridge on an NVIDIA GPU: stream order, devices and memory; and what a model does there, which a CPU shows too."""

import copy

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, from_flax, jax2torch, torch_to_jax

HAS_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
pytestmark = pytest.mark.filterwarnings("ignore:JAX reserves three quarters")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch and JAX do not both have a GPU here")]
LAYERS = {
    "BlockDiagLinear": lambda: BlockDiagLinear(64, 48, 4),
    "SparseLinear": lambda: SparseLinear(64, 48, 0.2),
    "BlockSparseLinear": lambda: BlockSparseLinear(64, 48, 0.5, block=(16, 16)),
}
N = 2048


def on_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
layers = pytest.mark.parametrize("name", LAYERS)


def layer_and_input(name, device):
    torch.manual_seed(0)
    return LAYERS[name]().to(device), torch.randn(8, 64).to(device)


def gradients(layer, x):
    """Of the sum of squares: of the input and of the parameters."""
    x = x.clone().requires_grad_()
    layer(x).float().square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def as_matrix(layer, values):
    """The dense weight of a layer with these values."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.copy_(values)
    return twin.to_linear().weight.detach()


@devices
@layers
def test_a_layer_computes_what_the_dense_one_with_its_weights_does(name, device):
    layer, x = layer_and_input(name, device)
    dense = layer.to_linear().to(device)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-4, rtol=1e-4)
    (dx, dw, db), (want_dx, want_dw, want_db) = gradients(layer, x), gradients(dense, x)
    kept = as_matrix(layer, torch.ones_like(layer.weight)) != 0
    for got, want in ((dx, want_dx), (as_matrix(layer, dw), want_dw * kept), (db, want_db)):
        torch.testing.assert_close(got, want.to(got.device), atol=1e-4, rtol=1e-4)


@devices
@layers
def test_autocast_computes_in_bfloat16_and_leaves_gradients_in_float32(name, device):
    layer, x = layer_and_input(name, device)
    want, exact = layer(x), gradients(copy.deepcopy(layer), x)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, found = layer(x), gradients(layer, x)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in found} == {torch.float32}
    for got, whole in zip([y.float(), *found], [want, *exact], strict=True):
        torch.testing.assert_close(got, whole, atol=0.05 * whole.abs().max().item(), rtol=0)


@devices
@layers
def test_a_scaled_loss_takes_the_step_of_one_that_is_not(name, device):
    layer, x = layer_and_input(name, device)
    plain = copy.deepcopy(layer)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for each, scale in ((layer, scaler), (plain, torch.amp.GradScaler(device, enabled=False))):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        scale.scale(each(x).square().mean()).backward()
        scale.unscale_(optimizer)
        scale.step(optimizer)
        scale.update()
    for got, want in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@devices
def test_a_model_of_flax_gives_its_values_and_gradients(device):
    model, x = linen.Dense(5), jax.random.normal(jax.random.key(1), (3, 4))
    variables = model.init(jax.random.key(0), x)
    net, given = from_flax(model, variables).to(device), torch.tensor(x.tolist(), device=device, requires_grad=True)
    y = net(given)
    y.square().sum().backward()
    dx = jax.grad(lambda x: (model.apply(variables, x) ** 2).sum())(x)
    for got, want in ((y, model.apply(variables, x)), (given.grad, dx)):
        assert got.device.type == device
        torch.testing.assert_close(got.detach().cpu(), torch.tensor(want.tolist()), atol=1e-4, rtol=1e-4)


def busy(x):
    """Keeps a stream busy for some milliseconds, and leaves x as it was."""
    for _ in range(20):
        x = x @ torch.eye(N, device=x.device)
    return x


@on_gpu
def test_values_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    layer, x = SparseLinear(64, 48, 0.2), torch.randn(8, 64)
    layer(x).square().sum().backward()
    on_cpu = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.cuda()(x.cuda()).square().sum().backward()
    for p, want in zip(layer.parameters(), on_cpu, strict=True):
        torch.testing.assert_close(p.grad.cpu(), want, atol=1e-4, rtol=1e-4)


@on_gpu
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


@on_gpu
def test_a_kept_view_of_a_parameter_sees_the_optimizers_last_step():
    layer, x = SparseLinear(N, N, 0.01, bias=False, device="cuda"), torch.ones(1, N, device="cuda")
    layer(x)
    with torch.no_grad():
        for value in (1.0, 2.0):
            layer.weight.copy_(busy(torch.full((N, N), value, device="cuda")).flatten()[: layer.weight.numel()])
            torch.testing.assert_close(layer(x).sum().cpu(), torch.tensor(value * layer.weight.numel()))


@on_gpu
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


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_device_that_is_not_current_works_and_stays_not_current():
    x = torch.ones(4, device="cuda:1", requires_grad=True)
    y = jax2torch(lambda x: x * 3)(x)
    y.sum().backward()
    assert y.device == x.grad.device == x.device and torch.cuda.current_device() == 0
    assert torch_to_jax(x.detach()).devices() == {jax.devices()[1]}
