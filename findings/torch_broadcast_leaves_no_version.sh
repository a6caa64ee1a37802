#!/usr/bin/env bash
# torch 2.13.0 on a CPU, two processes, gloo.
#
# dist.broadcast and dist.all_reduce write into the tensor they are given. Other writes in place count up its version, by
# which autograd notices that a saved tensor is no longer what the forward pass read, and raises. One would expect the
# same of these.
#
# They leave the version as it is. A broadcast into a factor between forward and backward pass goes unnoticed: the
# gradient is that of the received numbers, 2, and not of those that were multiplied by, 5. `copy_` at the same place
# raises, and all_gather does count up the versions of its outputs. A cache that follows a tensor by its version misses
# the write as well. Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
cat > collectives.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def gradient_after(write) -> list[float] | str:
    """Of a product by 5, into whose factor `write` puts other numbers before the backward pass."""
    factor, w = torch.full((3,), 5.0), torch.ones(3, requires_grad=True)
    product = (w * factor).sum()
    write(factor)
    try:
        product.backward()
    except RuntimeError:
        return "an error"
    return w.grad.tolist()


def counted(write, tensor) -> int:
    before = tensor._version
    write(tensor)
    return tensor._version - before


def work(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = torch.full((3,), 2.0)

    def broadcast(t: torch.Tensor) -> None:
        dist.broadcast(mine if rank == 0 else t, 0)

    gathered = [torch.zeros(3), torch.zeros(3)]
    found = {
        "gradient after broadcast": gradient_after(broadcast),
        "after copy_": gradient_after(lambda t: t.copy_(mine)),
        "counted by broadcast": counted(broadcast, torch.zeros(3)),
        "all_reduce": counted(dist.all_reduce, torch.ones(3)),
        "all_gather": counted(lambda t: dist.all_gather(gathered, mine), gathered[0]),
        "copy_": counted(lambda t: t.copy_(mine), torch.zeros(3)),
    }
    if rank == 1:
        results.put(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (sys.argv[1], results), 2)
    found = results.get()
    print("torch", torch.__version__, found)
    sys.exit(list(found.values()) != [[2.0, 2.0, 2.0], "an error", 0, 0, 1, 1])
PYTHON
venv/bin/python collectives.py "$work/store"
