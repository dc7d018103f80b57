"""The largest batch: the one that the checks ask a model for, and so the one that it is served with.

A model can see how many images come together. If it were served in larger batches than anybody asked, it could answer
otherwise there, and the evidence would be about another model.
"""

from __future__ import annotations

SERVED = 64  # images at most: more gain nothing on any processor that was measured
# In the images of a batch: 13 of 224 pixels, 682 of 32. EfficientNet-Lite0 takes 8 MB for each image of 224, so that 64
# would take half of the memory of a gate.
VALUES = 2**21


def most_asked(image: int) -> int:
    """Images of `image` values that the checks ask together; at least one."""
    return max(1, VALUES // max(1, image))


def most_served(image: int) -> int:
    """Images of `image` values that Triton answers together: no more than the checks ask."""
    return min(SERVED, most_asked(image))
