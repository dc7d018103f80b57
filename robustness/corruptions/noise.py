"""Noise of sensors and of lost values."""

from __future__ import annotations

import numpy as np

from dfmcl.robustness.corruptions.picture import Picture


def gaussian_noise(x: Picture, draw: np.random.RandomState, scale: float) -> Picture:
    """Of that standard deviation, by each value, as in the dark."""
    return x + draw.normal(scale=scale, size=x.shape)


def shot_noise(x: Picture, draw: np.random.RandomState, photons: float) -> Picture:
    """Poisson noise of so many photons where a value is 1."""
    counted: Picture = draw.poisson(x * photons) / photons
    return counted


def impulse_noise(x: Picture, draw: np.random.RandomState, share: float) -> Picture:
    """Salt and pepper: that share of values becomes 0 or 1."""
    chance, salt = draw.random_sample(x.shape), draw.random_sample(x.shape) < 0.5
    return np.where(chance < share, salt, x)
