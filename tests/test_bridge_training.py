"""Models of the bridge in the training tools of torch and its neighbours."""

import copy
import gc
import tracemalloc

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")
pytest.importorskip("safetensors", reason="saves to safetensors")

import jax
import jax.numpy as jnp
import safetensors.torch
import torch
from flax import linen
from torch.utils.checkpoint import checkpoint

from torch_bridge import BlockSparseLinear, SparseLinear, from_flax


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Dropout(0.2, deterministic=not train)(jnp.tanh(linen.Dense(6)(x)))
        return linen.Dense(3)(x)


def make_flax(**options):
    return from_flax(Net(), jax.jit(Net().init)(jax.random.key(0), jnp.ones((2, 5))), **options)


def make_mixed():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), make_flax(), SparseLinear(3, 2, 0.8))


def loss(model, rows=8):
    return model(torch.randn(rows, 7)).square().mean()


# ---- optimizers, precision, memory ----------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_foreach_and_fused_optimizers_step_as_the_plain_ones_do(kind, options):
    ends = []
    for how in (options, {"foreach": False}):
        model = make_mixed()
        optimizer = kind(model.parameters(), lr=0.05, **how)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_the_gradient_scaler_train_in_half_precision(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), make_flax(cast_inputs=torch.float32), SparseLinear(3, 2, 0.8))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, losses = torch.randn(16, 7), []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(x)
            assert y.dtype == dtype  # of the sparse layer
            losses.append((y.float() - 1).square().mean())
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < losses[0] and scaler.get_scale() == 1024.0
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_an_overflow_under_the_scaler_skips_the_step():
    layer = SparseLinear(4, 4, 1.0)
    before, scaler = layer.weight.detach().clone(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler.scale(layer(torch.full((1, 4), 1e38)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before) and scaler.get_scale() == 2.0**19


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_with_dropout_has_the_gradients_of_the_plain_one(reentrant):
    model, start = make_flax(), torch.randn(8, 5)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        x = start.clone().requires_grad_()
        call(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.slow  # a thousand calls
def test_a_thousand_calls_trace_once_and_keep_no_memory():
    model, x = make_flax(), torch.randn(4, 5)
    for _ in range(20):
        model(x).sum().backward()
    gc.collect()
    tracemalloc.start()
    arrays = len(jax.live_arrays())
    for _ in range(1000):
        model(x).sum().backward()
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (plan,) = model._model._plans.values()
    assert plan.op.traces == 1 and len(jax.live_arrays()) == arrays and grown < 100_000


# ---- other ways to hold and load weights ----------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_safetensors_files_load_though_their_tensors_are_misaligned(tmp_path, assign):
    model, x = make_mixed().eval(), torch.randn(3, 7)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = make_mixed().eval()
    with torch.no_grad():
        [p.zero_() for p in other.parameters()]
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), assign=assign)
    assert torch.equal(other(x), model(x))


def test_tied_weights_sum_their_gradients_and_move_together():
    first, second = (BlockSparseLinear(6, 6, 0.5, 2, bias=False) for _ in range(2))
    second.load_state_dict(first.state_dict())
    second.weight = first.weight
    x, optimizer = torch.randn(3, 6), torch.optim.SGD(first.parameters(), 0.1)
    second(first(x)).sum().backward()
    twin = copy.deepcopy(first)
    want = twin(twin(x)).sum()
    torch.testing.assert_close(first.weight.grad, torch.autograd.grad(want, twin.weight)[0])
    optimizer.step()
    assert torch.equal(first(x), second(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports
def test_a_parametrized_sparse_weight_is_followed():
    layer, x = SparseLinear(6, 4, 0.5), torch.randn(3, 6)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight", dim=None)
    plain = layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (plain - layer.bias))


def test_whole_models_can_be_saved_and_compiled_code_is_shared_by_copies(tmp_path):
    model, x = make_mixed().eval(), torch.randn(3, 7)
    y = model(x)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), y)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    (plan,) = model[1]._model._plans.values()
    assert twin[1]._model is model[1]._model and plan.op.traces == 1


# ---- neighbours ----------------------------------------------------------


class Regression(torch.nn.Module):
    """What transformers.Trainer trains: a forward pass that returns its loss."""

    def __init__(self):
        super().__init__()
        self.body = make_mixed()

    def forward(self, x, labels):
        y = self.body(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


@pytest.mark.slow  # a whole run
def test_transformers_trainer_trains_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers", reason="trains by the Trainer of transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    torch.manual_seed(0)
    data = [{"x": torch.randn(7), "labels": torch.ones(2)} for _ in range(32)]

    def trainer(steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02,
            gradient_accumulation_steps=2, save_steps=4, report_to=[], use_cpu=True, bf16=True, disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(Regression(), arguments, train_dataset=data)

    first = trainer(4)
    start = first.evaluate(data)["eval_loss"]
    first.train()
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and resumed.evaluate(data)["eval_loss"] < start
