"""A machine's profile that is given, so that tests time nothing."""

from jaxsparse.costs.machine import Profile

PROFILE = Profile(
    "jax",
    "a processor",
    2,
    {"float32": 2e11, "bfloat16": 1e11, "float16": 1e11, "float64": 1e11},
    {"blocks": 1e11, "entries": 5e10},
    {2**20: 5e10, 2**26: 2e10},
    {"forward": 4e-5, "gradients": 8e-5, "step": 1e-4},
)
