"""What compiling costs the two calls of `gpu.py`, measured without a GPU: python3 benchmarks/_gpu_costs.py FOLDER.

FOLDER holds the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version (pip install --no-deps --target
FOLDER ...), in which XLA's compiler for GPUs is. Prints the seconds of processor time that programs of each kind take.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    sys.path[:0] = [sys.argv[1], str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402

from benchmarks import _annotations, _gpu_cells  # noqa: E402, F401  annotations come first
from jaxsparse._sizes import is_unstructured  # noqa: E402


def measured(only: list[str]) -> None:
    """Prints the seconds that each contender of some cells takes, as a line of JSON for each."""
    import mosaic_compiled

    gpu = mosaic_compiled.mesh(1)
    for cell in _gpu_cells.deciding():
        if cell.name not in only:
            continue
        backends = ["triton"] if is_unstructured(cell.block) else ["mosaic", "triton"]
        for name, program in _gpu_cells.contenders(cell, backends).items():
            shapes = jax.tree.map(lambda a: mosaic_compiled.arrays(gpu, (a.shape, a.dtype))[0], program.operands)
            begin = time.process_time()
            with jax.sharding.use_abstract_mesh(gpu.abstract_mesh):
                jax.jit(program.function).lower(*shapes).compile()
            print(
                json.dumps({"cell": cell.name, "contender": name, "s": round(time.process_time() - begin, 2)}),
                flush=True,
            )


if __name__ == "__main__":
    measured(sys.argv[2:])
