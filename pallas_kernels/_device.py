"""Which GPU there is, and why it won't do."""

import jax


def why_no_gpu(platform: str, generation: tuple[int, int]) -> str | None:
    """The reason why kernels for a compute capability of at least `generation` can't run, or None."""
    if platform not in ("cuda", "gpu"):
        return f"these kernels run on an NVIDIA GPU, not on {platform}"
    try:
        found = min(tuple(map(int, d.compute_capability.split("."))) for d in jax.devices("cuda"))
    except RuntimeError:
        return "this machine has no NVIDIA GPU"
    if found < generation:
        has, needs = (".".join(map(str, v)) for v in (found, generation))
        return f"the GPU here has compute capability {has}, these kernels need {needs} or more"
    return None
