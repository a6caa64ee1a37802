"""torch's own states in a file: load_state_dict takes back what was saved, and training goes on bit by bit."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import jaxsparse  # noqa: E402
import torch_bridge  # noqa: E402
from torch_bridge import checkpoint  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, torch.tensor(1e-2), betas=(0.8, 0.95), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW([{"params": [q], "lr": 10**-n} for n, q in enumerate(p, 2)], foreach=False),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, history_size=3),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


def make(seed):
    torch.manual_seed(seed)
    sparse = torch_bridge.SparseLinear(16, 12, density=0.3)
    return torch.nn.Sequential(sparse, torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 4))


def assert_same(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert [(type(key), key) for key in got] == [(type(key), key) for key in wanted]
        for key in wanted:
            assert_same(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
    elif isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert checkpoint._to_numpy(got).tobytes() == checkpoint._to_numpy(wanted).tobytes()
    else:
        assert repr(got) == repr(wanted)


def test_a_models_state_dict_comes_back_as_it_was(tmp_path):
    model, fresh = make(0), make(1)
    checkpoint.save(tmp_path / "c", model.state_dict())
    state = checkpoint.load(tmp_path / "c")
    assert_same(state, model.state_dict())
    assert state._metadata == model.state_dict()._metadata  # the versions of the modules
    fresh.load_state_dict(state)
    x = torch.randn(5, 16)
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=0, atol=0)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    assert_same(safetensors.load_file(tmp_path / "c")["0.weight"], model[0].weight.detach())  # under its own name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_an_optimizers_state_dict_bit_by_bit(name, tmp_path):
    x, target = torch.randn(8, 16), torch.randn(8, 4)

    def steps(model, optimizer, schedule):
        for _ in range(2):

            def loss():
                optimizer.zero_grad()
                value = (model(x) - target).square().mean()
                value.backward()
                return value

            optimizer.step(loss)
            schedule.step()

    def everything(seed):
        model = make(seed)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    run, other = everything(0), everything(1)
    steps(*run)
    states = [part.state_dict() for part in run]
    checkpoint.save(tmp_path / "c", {"run": states, "epoch": 2})
    loaded = checkpoint.load(tmp_path / "c")
    assert_same(loaded, {"run": states, "epoch": 2})
    for part, state in zip(other, loaded["run"], strict=True):
        part.load_state_dict(state)
    steps(*run)
    steps(*other)
    assert_same([part.state_dict() for part in other], [part.state_dict() for part in run])


def test_a_state_dict_is_a_target(tmp_path):
    model, fresh = make(0), make(1)
    checkpoint.save(tmp_path / "c", model.state_dict())
    before = copy.deepcopy(fresh.state_dict())
    got = checkpoint.load(tmp_path / "c", fresh.state_dict())
    assert_same(got, model.state_dict())
    assert_same(fresh.state_dict(), before)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"\['0.weight'\] is float32 of shape \(58,\) in the file.*\(96,\)"):
        checkpoint.load(tmp_path / "c", {**fresh.state_dict(), **{"0.weight": torch.zeros(96)}})
    with pytest.raises(ValueError, match=r"\['0.weight'\] is float32 .* but float64"):
        checkpoint.load(tmp_path / "c", fresh.double().state_dict())
    with torch.device("meta"):
        assert_same(checkpoint.load(tmp_path / "c", make(1).state_dict()), model.state_dict())


def test_a_target_may_mix_tensors_arrays_and_patterns(tmp_path):
    pattern = jaxsparse.BlockPattern.random(jax.random.key(0), (9, 8), density=0.3)
    tree = {"t": torch.ones(2), "n": np.ones(2, np.int8), "j": jnp.ones(2), "p": pattern, "k": jax.random.key(0)}
    checkpoint.save(tmp_path / "c", tree)
    got = checkpoint.load(tmp_path / "c", tree)
    assert [type(value) for value in got.values()] == [type(value) for value in tree.values()]
    np.testing.assert_array_equal(got["p"].row_index, pattern.row_index)


ODD = {
    "no dimensions": torch.tensor(3),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "strided": torch.arange(6)[::2],
    "expanded": torch.ones(1).expand(3),
    "a gradient": torch.ones(2, requires_grad=True) * 2,
    "a parameter": torch.nn.Parameter(torch.ones(2)).detach(),
    "conjugate": torch.tensor([1 + 2j, 3j]).conj(),
    "negative": torch.tensor([1 + 2j, 3j]).conj().imag,
    "unsigned": torch.tensor([1, 2], dtype=torch.uint64),
    "truth": torch.tensor([True, False]),
    "rarer float8": torch.ones(3).to(torch.float8_e5m2fnuz),
    "generator": torch.Generator().get_state(),
    "a size": torch.Size([1, 2])[:],
}


@pytest.mark.parametrize("name", ODD)
def test_any_dense_tensor_is_saved_exactly(name, tmp_path):
    checkpoint.save(tmp_path / "c", [ODD[name]])
    wanted = tuple(ODD[name]) if isinstance(ODD[name], tuple) else ODD[name]
    assert_same(checkpoint.load(tmp_path / "c"), [wanted])


WRONG = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "no plain dense tensor, but torch.sparse_coo"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "no plain dense tensor, but torch.sparse_csr"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta"),
    "a dtype": (lambda: torch.float32, r"\['a'\] is a torch.dtype"),
    "a device": (lambda: torch.device("cpu"), r"\['a'\] is a torch.device"),
    "a module": (lambda: torch.nn.Linear(2, 2), r"\['a'\] is a torch.nn.*Linear, which can't be saved"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_dense_tensor_is_refused_with_its_path(name, tmp_path):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.save(tmp_path / "c", {"a": value()})
    assert "['a']" in str(error.value) and not list(tmp_path.iterdir())
