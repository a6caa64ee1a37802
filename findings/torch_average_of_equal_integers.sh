#!/usr/bin/env bash
# torch 2.13.0, torch.optim.swa_utils.AveragedModel(use_buffers=True).
#
# An average of two equal integers should be that integer. So a buffer of int32 that is the same in the model and in
# its average should stay the same, however often the average is updated.
#
# It falls instead, by up to 1 with each update and without end. The average is computed in float32 and cut to an
# integer: for a large n, 0.9999 n + 0.0001 n comes out a little below n. Indices in buffers become other indices.
# Seen on 2026-11-27.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

model = torch.nn.Linear(2, 2)
model.register_buffer("index", torch.arange(2_000_000, dtype=torch.int32))
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
print("torch", torch.__version__)
lost = []
for update in range(1, 301):
    averaged.update_parameters(model)
    if update % 100 == 0:
        lost.append(int((model.index - averaged.module.index).max()))
        print(f"after {update} updates the average of equal integers is up to {lost[-1]} too small")
sys.exit(not 0 < lost[0] < lost[1] < lost[2])
PYTHON
