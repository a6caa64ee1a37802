"""Sparse layers under DistributedDataParallel and FSDP2, over gloo: the same losses as in one process.

    python examples/torch_distributed.py --processes 2

Two lines are all that is special. DDP gives all processes the pattern of the first one, as it does with all buffers.
FSDP2 shards the parameters and leaves buffers alone, so there every process makes the model from the same seed.
"""

from __future__ import annotations

import argparse
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torch_bridge import BlockSparseLinear, SparseLinear


def make_model(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)  # the weights and the patterns
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        BlockSparseLinear(width, width, density=0.25, block=16),
        nn.ReLU(),
        SparseLinear(width, 10, density=0.5),
    )


def batch_of(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step: points around ten centres."""
    random = torch.Generator().manual_seed(step)
    labels = torch.randint(10, (size,), generator=random)
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(size, 64, generator=random), labels


def train(model: nn.Module, args: argparse.Namespace, rank: int = 0, processes: int = 1) -> list[float]:
    """The loss of every step over the whole batch, of which each process sees an equal share."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses, share = [], args.batch // processes
    for step in range(args.steps):
        x, labels = (a[rank * share : (rank + 1) * share] for a in batch_of(step, args.batch))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def work(rank: int, args: argparse.Namespace, port: int, found: dict[str, list[float]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    curves = {
        "DDP": train(DistributedDataParallel(make_model(0 if rank == 0 else 1, args.width)), args, rank, args.processes)
    }
    sharded = make_model(0, args.width)
    mesh = init_device_mesh("cpu", (args.processes,))
    for layer in sharded:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    curves["FSDP2"] = train(sharded, args, rank, args.processes)
    if rank == 0:
        found.update(curves)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128, help="a multiple of the processes")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if args.batch % args.processes:
        parser.error(f"--batch {args.batch} is no multiple of the {args.processes} processes that share it.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(work, (args, port, found), nprocs=args.processes)
        curves = dict(found)
    torch.set_num_threads(1)
    one = train(make_model(0, args.width), args)
    print(f"{'one process':12} loss {one[0]:.4f} -> {one[-1]:.4f}")
    for name, losses in curves.items():
        difference = max(abs(a - b) for a, b in zip(losses, one, strict=True))
        print(f"{name:12} loss {losses[0]:.4f} -> {losses[-1]:.4f}  largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
