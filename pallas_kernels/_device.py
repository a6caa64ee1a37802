"""Which GPU there is, and why it won't do."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """The GPU that a kernel is made for."""

    kind: str = ""
    multiprocessors: int = 132  # of an H100, where the program is compiled for another machine


def describe() -> Device:
    """The GPU of this machine, if there is one."""
    found = _gpus()
    return Device(found[0].device_kind, found[0].core_count) if found else Device()


def why_no_gpu(
    platform: str, elsewhere: bool, oldest: tuple[int, int], newest: tuple[int, int] | None = None
) -> str | None:
    """The reason why kernels for such compute capabilities can't run here, or, `elsewhere`, on any such machine."""
    if platform != "cuda":
        return f"these kernels run on an NVIDIA GPU, not on {platform}"
    if elsewhere:
        return None
    generations = [tuple(map(int, gpu.compute_capability.split("."))) for gpu in _gpus()]
    if not generations:
        return "this machine has no NVIDIA GPU"
    if min(generations) < oldest or max(generations) > (newest or max(generations)):
        has, needs = (", ".join(sorted({f"{a}.{b}" for a, b in some})) for some in (generations, [oldest]))
        return f"the GPU here has compute capability {has}, these kernels need {needs}" + " or more" * (newest is None)
    return None


def _gpus():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []
