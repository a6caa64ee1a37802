"""Patterns that move while a sparse weight is trained: SET, RigL and gradual magnitude pruning, as pure functions.

Each takes values, pattern and optimizer state and returns them anew: under `jit` a whole run is one program. Kept
entries take their values and moments along bit by bit; grown ones start at zero in all of them. Of equal scores the
entry that is stored first, by output column and then by input row, is kept or grown; scores are compared in float32.

Under `jit` on a mesh every device chooses from whole arrays, so that all choose the same, and the same as one device.
"""

from jaxsparse.training.dynamic import CHUNK, compact, gradual, move, rigl, set_

__all__ = ["CHUNK", "compact", "gradual", "move", "rigl", "set_"]
