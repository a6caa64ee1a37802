"""What `jax.export` needs to know of the products.

JAX exports no custom call that it can't vouch for. Those of the CPU kernels keep their names and operands within one
version of this package, and a process that runs an exported program has to know them:

    exported = jax.export.export(jax.jit(f), disabled_checks=exporting.disabled_checks())(*args)
    data = exported.serialize()

    exporting.register()  # where it runs
    jax.export.deserialize(data).call(*args)

Platforms without kernels of ours get plain XLA, which needs neither.
"""

import jax

from cpu_kernels import _library


def disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The checks of `jax.export.export` that the products need to be without: one for each custom call of theirs."""
    return [jax.export.DisabledSafetyCheck.custom_call(f"jaxsparse_cpu_{name}") for name in _library.products()]


def register() -> None:
    """Makes the CPU kernels known to XLA in this process, for programs that were exported in another.

    Raises:
      NotImplementedError: if they can't be loaded, with the reason.
    """
    _library.load()
