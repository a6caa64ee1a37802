#!/usr/bin/env bash
# safetensors 0.8.0, safetensors.numpy.save_file, numpy 2.4.6.
#
# An array that is a view, as w.T or w[:, ::2], holds numbers like any other. One would expect to load what was saved,
# or an error: safetensors.torch.save_file refuses such tensors, and says what to call first.
#
# The memory behind the view is written, in its own order and from its start, under the shape of the view. So other
# numbers come back, without a word. A weight that is transposed on its way into the file comes back scrambled.
# Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q safetensors==0.8.0 numpy==2.4.6
venv/bin/python - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

print("safetensors", safetensors.__version__)
w = np.arange(6.0).reshape(2, 3)
differ = []
for name, view in {"w.T": w.T, "w[:, ::2]": w[:, ::2]}.items():
    save_file({"it": view}, "it.safetensors")
    loaded = load_file("it.safetensors")["it"]
    differ.append(not np.array_equal(loaded, view))
    print(f"{name}: saved {view.tolist()}, loaded {loaded.tolist()}")
sys.exit(differ != [True, True])
PYTHON
