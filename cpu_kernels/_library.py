"""The compiled kernels: found, checked against this jaxlib, and registered with XLA once."""

import ctypes
import functools
import os
import pathlib
import re

import cpu_kernels

_NAME = "libjaxsparse_cpu.so"


def load() -> ctypes.CDLL:
    """Returns the library with its handlers registered, or raises with what stops it."""
    if reason := why_not_loaded():
        raise NotImplementedError(f"the cpu kernels can't run: {reason}")
    return _registered()


def library_file() -> pathlib.Path | None:
    """The library; in an editable install it lies apart from the sources, in another folder of the package."""
    folders = map(pathlib.Path, cpu_kernels.__path__)
    return next((folder / _NAME for folder in folders if (folder / _NAME).exists()), None)


@functools.cache
def why_not_loaded() -> str | None:
    """Returns why the kernels can't be used with this jaxlib, or None when they can."""
    if reason := why_not_opened():
        return reason
    built = opened().jaxsparse_cpu_ffi_major(), opened().jaxsparse_cpu_ffi_minor()
    return _why_versions_clash(built, _jaxlib_version())


@functools.cache
def why_not_opened() -> str | None:
    """Returns why the library can't be opened, or None when it can, whatever runs its kernels."""
    if library_file() is None:
        return (
            f"{_NAME} was not built. Install a C++17 compiler (g++ 10 or clang 14 and newer) and reinstall jaxsparse."
        )
    try:
        library = opened()
    except OSError as error:
        return f"{_NAME} can't be loaded: {error}"
    return _why_not_isa(library, os.environ.get("JAXSPARSE_CPU_ISA"))


def _why_not_isa(library: ctypes.CDLL, wish: str | None) -> str | None:
    """An instruction set that was asked for by name is used, or refused: it may be misspelt."""
    if not wish or library.jaxsparse_cpu_use_isa(wish.encode()):
        return None
    return f"JAXSPARSE_CPU_ISA is {wish!r}, which can't run here. Give amx, avx512, avx2 or portable, or unset it."


# A jaxlib serves handlers built for its own C API or an older one. With a newer one it would
# fail while it initialises its CPU back end, and take every other computation along.
def _why_versions_clash(built: tuple[int, int], running: tuple[int, int]) -> str | None:
    if built[0] == running[0] and built[1] <= running[1]:
        return None
    return (
        f"they were built for XLA's C API {built[0]}.{built[1]}, this jaxlib has "
        f"{running[0]}.{running[1]}. Update jaxlib, or reinstall jaxsparse with this one."
    )


def _jaxlib_version() -> tuple[int, int]:
    import jax

    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    versions = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", header))
    return int(versions["MAJOR"]), int(versions["MINOR"])


@functools.cache
def opened() -> ctypes.CDLL:
    """The library as it is, without a word to XLA."""
    library = ctypes.CDLL(str(library_file()))
    library.jaxsparse_cpu_isa.restype = ctypes.c_char_p
    library.jaxsparse_cpu_use_isa.argtypes = [ctypes.c_char_p]
    library.jaxsparse_cpu_products.restype = ctypes.c_char_p
    return library


@functools.cache
def products() -> tuple[str, ...]:
    """The products that the library has, by name; none where it can't be opened."""
    return () if why_not_opened() else tuple(opened().jaxsparse_cpu_products().decode().split())


@functools.cache
def _registered() -> ctypes.CDLL:
    import jax

    library = opened()
    for name in products():
        handler = jax.ffi.pycapsule(getattr(library, f"jaxsparse_cpu_{name}"))
        jax.ffi.register_ffi_target(f"jaxsparse_cpu_{name}", handler, platform="cpu")
    return library
