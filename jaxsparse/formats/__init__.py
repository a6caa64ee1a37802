"""Where the non-zeros of a matrix are: one file for each way to store them."""

from jaxsparse.formats.block import BlockPattern
from jaxsparse.formats.n_m import NMPattern

Pattern = BlockPattern | NMPattern
PATTERNS = (BlockPattern, NMPattern)  # what layers, checkpoints and masks take for a pattern

__all__ = ["PATTERNS", "BlockPattern", "NMPattern", "Pattern"]
