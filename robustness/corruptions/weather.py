"""Snow, frost, fog, sun."""

from __future__ import annotations

import numpy as np

from dfmcl.robustness.corruptions.picture import Picture, plasma, streaked, zoomed

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
ICE = np.array([0.86, 0.93, 1.0])  # of red, green, blue


def snow(
    x: Picture,
    draw: np.random.RandomState,
    mean: float,
    spread: float,
    zoom: float,
    least: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Picture:
    """Flakes that fall in one direction over a picture that is whitened.

    mean, spread: of the normal noise that flakes are the peaks of. zoom: their size. least: below it there is none.
    radius, sigma: of their streaks. kept: the picture's own share of what lies behind them.
    """
    flakes = zoomed(draw.normal(mean, spread, size=(*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = streaked(flakes, radius, sigma, draw.uniform(-135, -45))
    grey = x @ LUMINANCE[:, None] if x.shape[2] == 3 else x
    behind = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    fallen: Picture = behind + flakes + flakes[::-1, ::-1]
    return fallen


def frost(x: Picture, draw: np.random.RandomState, kept: float, ice: float) -> Picture:
    """Ice over a picture that is darkened. The benchmark lays photographs of ice over it; here crystals are drawn.

    Ridges of three clouds, so figures under `frost` are not to be compared with published ones.
    """
    ridges = [1 - np.abs(2 * plasma(x.shape, 1.5, draw) - 1) for _ in range(3)]
    crystals = np.maximum.reduce(ridges)[..., None] ** 6
    tint = ICE if x.shape[2] == 3 else np.full(x.shape[2], ICE.mean())
    frozen: Picture = kept * x + ice * (0.2 + 0.8 * crystals) * tint
    return frozen


def fog(x: Picture, draw: np.random.RandomState, thick: float, decay: float) -> Picture:
    """Clouds over the picture, which keeps its brightest value."""
    most = x.max()
    clouds = plasma(x.shape, decay, draw)[..., None]
    foggy: Picture = (x + thick * clouds) * most / (most + thick)
    return foggy


def brightness(x: Picture, draw: np.random.RandomState, more: float) -> Picture:
    """The value of hue, saturation and value raised; the other two stay."""
    value = x.max(axis=2, keepdims=True)
    raised = np.clip(value + more, 0, 1)
    bright: Picture = np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)
    return bright
