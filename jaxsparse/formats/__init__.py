"""Where the non-zeros of a matrix are: one file for each way to store them."""

from jaxsparse.formats.block import BlockPattern

__all__ = ["BlockPattern"]
