"""probes.npz: the images that a gate attacked, what the attacks made of them, and the logits that decided.

It keeps `change`, what was added, in place of the adversarial images, which hardly compress.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gating.attestation import BadEvidence

# What numpy.load raises, depending on which byte is another.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


def as_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An archive for `numpy.load`, compressed by LZMA: photographs take a sixth less, changes two thirds of zlib's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # without today's date: the same arrays are the same bytes
            archive.writestr(entry, member.getbuffer(), zipfile.ZIP_LZMA)
    return buffer.getvalue()


def read_probes(path: Path) -> dict[str, NDArray[Any]]:
    """The images that a gate attacked, and `adversarial`, what the attacks made of them; BadEvidence for no such file.

    images, change, adversarial: uint8 `(N, H, W, C)`; labels: `(N,)`; clean_logits, adversarial_logits: float32
    `(N, K)`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found: dict[str, NDArray[Any]] = {name: np.asarray(archive[name]) for name in archive.files}
        images, change = found["images"], found["change"]
        labels, logits = found["labels"], (found["clean_logits"], found["adversarial_logits"])
    except DAMAGED as error:
        raise BadEvidence(f"{path}: not the gate's probes ({error}); run dfmcl gate again") from None
    fit = (
        images.dtype == change.dtype == np.uint8
        and images.ndim == 4
        and images.shape == change.shape
        and labels.shape == images.shape[:1]
    )
    if not fit or any(part.ndim != 2 or len(part) != len(images) for part in logits):
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in found.items())
        raise BadEvidence(f"{path}: what it holds does not fit together ({shapes}); run dfmcl gate again")
    return {**found, "adversarial": images + change}  # modulo 256
