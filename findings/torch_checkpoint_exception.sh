#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.
#
# What is raised for a checkpoint that does not fit should be an Exception, so that `except Exception` catches it.
#
# CheckpointException derives from BaseException alone, as KeyboardInterrupt does. Code that falls back to another
# checkpoint, or that logs what went wrong, under `except Exception` does not see it, and the program ends.
# Seen on 2026-11-27.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import sys
import warnings

import torch
from torch.distributed import checkpoint

warnings.filterwarnings("ignore")  # of one process alone
print("torch", torch.__version__)
checkpoint.save({"a": torch.ones(2)}, checkpoint_id="saved")
caught = None
try:
    try:
        checkpoint.load({"b": torch.ones(2)}, checkpoint_id="saved")
    except Exception as error:
        caught = f"`except Exception` caught {type(error).__name__}"
except BaseException as error:
    caught = f"`except Exception` let {type(error).__name__} pass, a {type(error).__base__.__name__}"
print(caught)
sys.exit("let CheckpointException pass" not in str(caught))
PYTHON
