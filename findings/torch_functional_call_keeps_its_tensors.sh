#!/usr/bin/env bash
# torch 2.13.0, torch.func.functional_call on a module that its parent holds twice.
#
# functional_call computes with other tensors in the place of the parameters. Its page says nothing of a change of the
# module: after the call one would expect the parameters that were there before.
#
# Where the same layer stands in a model twice, it keeps the other tensor. The model lists that among its parameters,
# but it is a plain tensor without a gradient: training leaves it as it is. The default tie_weights=True replaces the tensor by both of its names, one after
# the other, and puts back by the second name what the first one had put there. A parameter that two layers share is
# put back, and with tie_weights=False so is the layer's.
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


def is_put_back(model, **options):
    before = model[0].weight
    torch.func.functional_call(model, {"0.weight": torch.zeros(2, 2)}, (torch.ones(1, 2),), **options)
    return model[0].weight is before


layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
print("torch", torch.__version__)
one, twice = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(layer, layer)
shared = nn.Sequential(nn.Linear(2, 2), other)
other.weight = shared[0].weight
seen = {
    "one layer": is_put_back(one),
    "two layers with one weight": is_put_back(shared),
    "a layer twice, tie_weights=False": is_put_back(twice, tie_weights=False),
    "a layer twice": is_put_back(twice),
}
for name, kept in seen.items():
    print(f"{name}: its parameter is {'put back' if kept else 'gone'}")
left = dict(twice.named_parameters())["0.weight"]
print(f"what the model then lists: a {type(left).__name__}, requires_grad={left.requires_grad}")
sys.exit(list(seen.values()) != [True, True, True, False] or left.requires_grad)
PYTHON
