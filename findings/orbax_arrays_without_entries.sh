#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, with jax 0.10.2.
#
# A tree of arrays is what one saves, and an array of no entries is an array: one would expect to get it back.
#
# Saving is refused as soon as one array of the tree has no entries.
# Seen on 2026-11-27.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

print("orbax-checkpoint", importlib.metadata.version("orbax-checkpoint"))


def save(name, tree):
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(pathlib.Path(name).absolute(), tree)
        return "saved"
    except ValueError as error:
        return f"refused: {str(error).splitlines()[0][:150]}"


print("one entry:", one := save("one", {"a": jnp.ones(2), "b": jnp.ones(1)}))
print("no entry:", none := save("none", {"a": jnp.ones(2), "b": jnp.ones(0)}))
sys.exit(not (one == "saved" and none.startswith("refused")))
PYTHON
