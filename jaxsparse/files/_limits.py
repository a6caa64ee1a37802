"""How large a matrix a file may state."""

from __future__ import annotations

_FREE = 2**22  # rows and columns that any file may state: their pointers take 16 MiB


def check_sizes(rows: int, cols: int, size: int) -> None:
    """Raises ValueError where a matrix's pointers would take much more memory than the `size` bytes of its file."""
    if rows < 1 or cols < 1:
        raise ValueError(f"a matrix of ({rows}, {cols}) has no entries.")
    if rows + cols > _FREE + size:
        raise ValueError(
            f"it states ({rows}, {cols}) in {size} bytes: the pointers of so many rows and columns would take "
            f"{4 * (rows + cols)} bytes of memory. No layer is so empty; cut off the rows and columns without entries."
        )
