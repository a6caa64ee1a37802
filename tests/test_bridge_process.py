"""The bridge among several processes: DDP and FSDP over gloo, forked workers; and what it says about memory."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

from torch_bridge import _process

SHARED = """
    import os, sys
    import jax, jax.numpy as jnp, torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from flax import linen
    from torch_bridge import BlockDiagLinear, SparseLinear, from_flax
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

    def make():
        torch.manual_seed(0)
        dense = linen.Dense(6)
        variables = dense.init(jax.random.key(0), jnp.ones((1, 6)))
        flax = from_flax(dense, variables)
        return torch.nn.Sequential(BlockDiagLinear(4, 6, 2), torch.nn.Tanh(), flax, SparseLinear(6, 4, 0.5))

    def train(model, samples):
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        for x in samples:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return model

    torch.manual_seed(1)
    both = torch.randn(4, 2, 8, 4)  # steps, ranks, batch, features
    want = train(make(), both.flatten(1, 2))
    ours = both[:, rank]

    parallel = train(DistributedDataParallel(make(), gradient_as_bucket_view=True), ours)
    for p, q in zip(parallel.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

    sharded, mesh = make(), init_device_mesh("cpu", (2,))
    for layer in (sharded[0], sharded[2], sharded[3], sharded):
        fully_shard(layer, mesh=mesh)
    train(sharded, ours)
    for p, q in zip(sharded.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, atol=1e-5, rtol=1e-4)
    distributed.destroy_process_group()
"""

FORKED = """
    import os, sys, warnings
    import torch, jax.numpy as jnp
    from torch.utils.data import DataLoader, Dataset
    from torch_bridge import BridgeError, jax2torch
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's own word on it
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    double = jax2torch(lambda x: x * 2)

    class Data(Dataset):
        def __init__(self, use):
            self.use = use
        def __len__(self):
            return 4
        def __getitem__(self, i):
            return double(torch.ones(2)) if self.use else torch.ones(2)

    if __name__ == "__main__":
        double(torch.ones(2))
        for batch in DataLoader(Data(False), batch_size=2, num_workers=1, multiprocessing_context="fork"):
            assert torch.equal(double(batch), torch.full((2, 2), 2.0))
        try:
            next(iter(DataLoader(Data(True), num_workers=1, multiprocessing_context="fork", timeout=60)))
        except BridgeError as error:
            assert "forkserver" in str(error)
        else:
            raise AssertionError("nothing was raised in the forked worker")
        (batch, *_) = DataLoader(Data(True), num_workers=1, multiprocessing_context="forkserver", timeout=60)
        assert torch.equal(batch, torch.full((1, 2), 2.0))
"""


def start(path, *arguments):
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_success(*processes, seconds=150):
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo by a shared file, as on Linux")
def test_two_processes_train_as_one_does_on_both_batches(tmp_path):
    program = tmp_path / "shared.py"
    program.write_text(textwrap.dedent(SHARED))
    assert_success(*[start(program, rank, tmp_path / "rendezvous") for rank in range(2)])


@pytest.mark.slow  # processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_workers_may_not_call_jax_and_are_told_so(tmp_path):
    program = tmp_path / "forked.py"
    program.write_text(textwrap.dedent(FORKED))
    assert_success(start(program))


@pytest.mark.parametrize("setting", [None, "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION"])
def test_preallocation_is_warned_about_unless_it_was_chosen(monkeypatch, recwarn, setting):
    for name in _process._MEMORY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, "1")
    _process.warn_of_preallocation.cache_clear()
    _process.warn_of_preallocation()
    _process.warn_of_preallocation()
    assert len(recwarn) == (setting is None)
