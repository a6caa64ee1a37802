"""Memory for large results, in large pages.

What the C library maps for an allocation above 32 MiB goes back to the system with the tensor. So the gradient of a
large weight is new memory in every step, which the system clears page by page. In pages of 4 KiB that takes longer than
many a product; in pages of 2 MiB it takes a third.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_LARGE = 32 << 20  # bytes; glibc keeps smaller pieces for the next allocation
_PAGE = 2 << 20
_HUGEPAGE = 14  # MADV_HUGEPAGE of Linux: a wish, which the system need not fulfil


def in_large_pages(t: Tensor) -> Tensor:
    """The same tensor, of which nothing has been written; a small one as it is."""
    if t.nbytes >= _LARGE and t.is_cpu and (advise := _advise()):
        begin = -(-t.data_ptr() // _PAGE) * _PAGE
        advise(begin, t.data_ptr() + t.nbytes - begin, _HUGEPAGE)
    return t


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
