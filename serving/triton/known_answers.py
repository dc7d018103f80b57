"""The answers that the gate recorded, asked again of a live endpoint: health checks say ready when it is not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import BadInput, WrongAnswer
from dfmcl.gating.signing.attestation import BadEvidence
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.release import layout
from dfmcl.release.verification import Promoted
from dfmcl.serving.clients.triton import Client

IMAGES = 32  # as they were, and as many adversarial ones; together one full batch
# Of the largest logit: batch shape and threads reorder float32 sums, about 1e-6; another model is whole logits away.
TOLERANCE = 1e-3


def known_answers(release: Promoted) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Images (n, H, W, C) and logits (n, K) that the gate recorded for a version, clean and adversarial, n <= 64."""
    path = release.path / layout.PROBES
    try:
        probes = read_probes(path)
    except BadEvidence as error:
        raise BadInput(str(error)) from None
    images = np.concatenate([probes["images"][:IMAGES], probes["adversarial"][:IMAGES]])
    logits = np.concatenate([probes["clean_logits"][:IMAGES], probes["adversarial_logits"][:IMAGES]])
    if not len(images):
        raise BadInput(f"{path}: holds no images; run dfmcl gate again")
    return images, logits


def require_known_answers(client: Client, release: Promoted) -> None:
    """Raise WrongAnswer where another version answers, or with other logits; AnswerError where nobody does."""
    images, expected = known_answers(release)
    answer = client.predict(images)
    where = f"model {release.model!r}, version {answer.version}"
    if answer.version != str(release.version):
        raise WrongAnswer(f"{where}: answers where version {release.version} should")
    if answer.logits.shape != expected.shape:
        raise WrongAnswer(f"{where}: logits {answer.logits.shape}, the gate recorded {expected.shape}")
    difference = float(np.abs(answer.logits - expected).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= tolerance:  # so that NaN is refused too
        raise WrongAnswer(
            f"{where}: logits are {difference:.3g} off those the gate recorded (tolerance {tolerance:.3g});"
            " the runtime or the bytes differ from what was judged"
        )
