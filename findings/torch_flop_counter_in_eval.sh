#!/usr/bin/env bash
# torch 2.13.0, torch.utils.flop_counter.FlopCounterMode and nn.TransformerEncoderLayer, on a CPU.
#
# A forward pass multiplies the same matrices in training and in evaluation (no dropout here). One would expect the same
# number of FLOPs, or a word about what can't be counted.
#
# In evaluation the layer takes its fast path, a single operator, and the counter has no formula for that: it counts 0
# and says nothing. It counts 0 for nn.LSTM too, in training as well.
# Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops(f):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f()
    return counter.get_total_flops()


layer, lstm = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), nn.LSTM(64, 64)
x = torch.ones(2, 8, 64)
print("torch", torch.__version__)
layer.train()
training = flops(lambda: layer(x))
layer.eval()
seen = {"evaluation": flops(lambda: layer(x)), "LSTM": flops(lambda: lstm(x))}
print("training:", training, *(f"{name}: {count}" for name, count in seen.items()))
sys.exit(training == 0 or any(seen.values()))
PYTHON
