"""Fixtures that several test files share."""

import jax
import pytest


@pytest.fixture
def strict():
    """Strict dtype promotion: an op that mixes dtypes by accident raises."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield
