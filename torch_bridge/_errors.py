"""The error that every part of the bridge raises."""


class BridgeError(TypeError):
    """A value that cannot cross between torch and JAX: which one, why, and what to do about it."""
