#!/usr/bin/env bash
# torch 2.13.0 on a CPU, Linux with glibc 2.36.
#
# A training step frees the gradients of the step before (zero_grad sets them to None), and makes as large ones again. One
# would expect the memory to be used again, whatever the size of a weight.
#
# Up to 32 MiB it is. A gradient above that is given back to the system when it is freed, and comes from it anew in every
# step, 4 KiB at a time: 31 MiB touch no new page a step, 33 MiB more than 8,000. torch keeps no memory of its own on
# CPUs, and glibc's limit for pieces that it maps apart follows what was freed up to 32 MiB and no further. Where new pages
# are dear, as on virtual machines, such a step takes a fifth longer. Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import platform
import resource
import sys

import torch


def new_pages(mib: int) -> float:
    """Pages that are new to the process in a step of SGD with one weight of so many MiB."""
    rows = mib * 256
    w, x = torch.nn.Parameter(torch.randn(rows, 1024)), torch.randn(64, rows)
    optimizer = torch.optim.SGD([w], lr=1e-3)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (x @ w).sum().backward()
            optimizer.step()

    steps(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(10)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10


print("torch", torch.__version__, *platform.libc_ver())
below, above = new_pages(31), new_pages(33)
print(f"new pages a step: {below:.0f} with a weight of 31 MiB, {above:.0f} with one of 33 MiB")
sys.exit(not below < 100 < 8000 < above)
PYTHON
