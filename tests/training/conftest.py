"""Data that many tests of the trainer look at."""

from __future__ import annotations

import pytest

from dfmcl.robustness.data import Dataset, load_dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """scikit-learn's digits as 16x16 images."""
    return load_dataset("digits")
