"""What the C library does with memory that arrays have left."""

from __future__ import annotations

import ctypes

_TRIM, _FROM_SYSTEM, _PIECES_FROM_SYSTEM = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of glibc
_NEVER = -1
_AS_GLIBC_ENDS = {_PIECES_FROM_SYSTEM: 65536, _FROM_SYSTEM: 32 << 20, _TRIM: 64 << 20}


def keep_memory(keep: bool = True) -> bool:
    """Lets this process keep the memory that arrays leave, for the next ones.

    Training makes every result and every gradient anew. The C library gives what they leave back to the system: pieces
    above 32 MiB at once, others when more lies free than twice the largest of them. The system clears new memory page
    by page as it is first written, and that can take longer than the products: half of a step where one gradient has
    32 MiB and more. It concerns all arrays of torch, NumPy and JAX on a CPU, dense ones too.

    The price: freed memory stays with the process, as high as it ever was, until `keep_memory(False)`. To be called
    before training, once. Where the program can't be changed, `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184`
    in its environment do the same.

    Args:
      keep: False gives back what is free, and sets the limits at which glibc's own adjustment ends.
    Returns:
      Whether this C library takes such wishes: glibc does, others and other systems do not.
    Source: mallopt(3) and malloc_trim(3) of glibc.
    """
    try:
        library = ctypes.CDLL(None)
        set_option, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return False
    wishes = {_PIECES_FROM_SYSTEM: 0, _TRIM: _NEVER} if keep else _AS_GLIBC_ENDS
    done = [set_option(ctypes.c_int(option), ctypes.c_int(value)) for option, value in wishes.items()]
    if not keep:
        trim(ctypes.c_size_t(0))
    return all(done)
