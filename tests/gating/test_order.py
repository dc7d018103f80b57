"""The order of the images: nobody without the gate's key can tell it, and a report that claims a key must prove it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Key, Signature

from dfmcl.common.errors import BadInput
from dfmcl.gating.order import Draw, Matter, order_of
from dfmcl.gating.resumption import secret_of
from dfmcl.gating.signing.attestation import NotAttested, Trust, sign_evidence, verify
from dfmcl.gating.signing.evidence import ATTESTATION, candidate_files
from dfmcl.gating.signing.keys import read_signer
from dfmcl.gating.signing.trust import load_trust
from tests.exports import Export
from tests.present import present
from tests.serving.workshop import write_run
from tests.signing import make_key, policy_of, report_on, trusting, write_report, write_trust

MATTER = Matter("a" * 64, "b" * 64, "c" * 64, 450)
SIGNER = CryptoSigner.generate_ed25519()
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(model=DIGESTS, data=DIGESTS, policy=DIGESTS, images=st.integers(1, 300))
def test_an_order_is_a_permutation_that_follows_from_what_is_judged(
    model: str, data: str, policy: str, images: int
) -> None:
    """The same always, drawn by the same key or by none."""
    matter = Matter(model, data, policy, images)
    for draw in (None, Draw.by(SIGNER, matter)):
        order = order_of(matter, draw)
        assert sorted(order) == list(range(images))
        np.testing.assert_array_equal(order, order_of(matter, draw))
    assert Draw.by(SIGNER, matter) == draw
    assert draw is not None
    assert draw.is_by(SIGNER.public_key, matter)


def test_an_order_that_flatters_without_the_key_does_not_with_it() -> None:
    """28 % hold. Of 3,000 files the best order begins with many that do; the key's order of that file does not."""
    held = np.random.default_rng(0).random(450) < 0.28
    files = [Matter(f"{number:064x}", "b" * 64, "c" * 64, 450) for number in range(3000)]
    share = [float(held[order_of(file)[:60]].mean()) for file in files]
    best = files[int(np.argmax(share))]
    assert max(share) > 0.43
    drawn = [float(held[order_of(best, Draw.by(CryptoSigner.generate_ed25519(), best))[:60]].mean()) for _ in range(40)]
    assert max(drawn) < max(share)
    assert abs(np.mean(drawn) - held.mean()) < 0.043  # five of its standard errors, 0.0085: keys are new each run


@dataclass(frozen=True)
class Elsewhere:
    """A key that signs in another process, as one in an HSM does: no private byte of it is in this one."""

    path: Path
    public_key: Key

    def sign(self, payload: bytes) -> Signature:
        with NamedTemporaryFile() as text:
            text.write(payload)
            text.flush()
            command = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(self.path), "-in", text.name]
            made = subprocess.run(command, capture_output=True, check=True)
        return Signature(self.public_key.keyid, made.stdout.hex())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_key_that_lies_elsewhere_does_all_that_a_file_does(candidate: Path, tmp_path: Path) -> None:
    """It draws the order, seals an interrupted gate's blocks and signs, each with the bytes that the file's gives."""
    key = make_key(tmp_path, "release")
    here, there = read_signer(key), Elsewhere(key, read_signer(key).public_key)
    assert Draw.by(there, MATTER) == Draw.by(here, MATTER)
    assert secret_of([there]) == secret_of([here]) != secret_of([SIGNER])
    evidence = evidence_of(candidate, tmp_path / "evidence", Draw.by(there, matter_of(candidate)), key)
    signed = (evidence / ATTESTATION).read_text()
    (evidence / ATTESTATION).unlink()
    sign_evidence(evidence, [there])
    assert (evidence / ATTESTATION).read_text() == signed


def test_a_key_that_could_choose_its_signature_draws_no_order(candidate: Path, tmp_path: Path) -> None:
    """ECDSA signs a text differently each time: its holder could try until an order pleased. It may sign evidence."""
    chooser = CryptoSigner.generate_ecdsa()
    assert chooser.sign(MATTER.text).signature != chooser.sign(MATTER.text).signature
    for use in (lambda: Draw.by(chooser, MATTER), lambda: secret_of([chooser])):
        with pytest.raises(BadInput, match=r"ecdsa-sha2-nistp256 signs .* cannot draw an order; name an ed25519 key"):
            use()
    evidence = evidence_of(candidate, tmp_path / "evidence", None, make_key(tmp_path, "release"))
    sign_evidence(evidence, [chooser])
    assert verify(candidate, evidence, Trust((chooser.public_key,))).verdict == "passed"


@pytest.mark.parametrize("other", [{"model": "d" * 64}, {"data": "d" * 64}, {"policy": "d" * 64}, {"images": 449}])
def test_a_draw_is_of_one_matter_and_one_key(other: dict[str, Any]) -> None:
    """Neither another file's signature nor another key's counts."""
    draw = Draw.by(SIGNER, MATTER)
    assert not draw.is_by(SIGNER.public_key, Matter(**{**vars(MATTER), **other}))
    stranger = CryptoSigner.generate_ed25519()
    assert not draw.is_by(stranger.public_key, MATTER)
    assert not Draw(SIGNER.public_key.keyid, Draw.by(stranger, MATTER).signature).is_by(SIGNER.public_key, MATTER)


@pytest.mark.parametrize(
    "value",
    [
        {"keyid": "a" * 64, "signature": "b" * 127},
        {"keyid": "a" * 64, "signature": "B" * 128},  # another text of the same signature would be another order
        {"keyid": "a" * 64, "signature": " " + "b" * 127},
    ],
)
def test_what_is_no_draw_is_refused(value: dict[str, Any]) -> None:
    """Only 32 and 64 bytes in lower-case hex are."""
    with pytest.raises(BadInput, match="bytes in hex"):
        Draw.from_json(value)
    for other, why in (({"keyid": 3, "signature": "b" * 128}, "keyid"), ({"keyid": "a" * 64}, "lacks 'signature'")):
        with pytest.raises(ValueError, match=why):
            Draw.from_json(other)


@pytest.fixture(scope="module")
def candidate(export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really exported one."""
    place = tmp_path_factory.mktemp("order")
    return export_once(write_run(place / "run"), place / "candidate")


def evidence_of(candidate: Path, place: Path, draw: Draw | None, signed: Path) -> Path:
    """A report whose order a draw gives, signed by a key whatever it says."""
    place.mkdir()
    return write_report(place, report_on(candidate, place, draw=draw), signed)


def matter_of(candidate: Path, images: int = 40) -> Matter:
    """Of the reports of tests/signing.py."""
    return Matter(candidate_files(candidate)["model.onnx"], "d" * 64, policy_of().digest, images)


def test_evidence_whose_order_a_trusted_key_drew_is_believed(candidate: Path, tmp_path: Path) -> None:
    """With `drawn = true` only that; without it any order that follows, so that keys can rotate."""
    key, other = make_key(tmp_path, "release"), make_key(tmp_path, "other")
    drawn = evidence_of(candidate, tmp_path / "drawn", Draw.by(read_signer(key), matter_of(candidate)), key)
    plain = evidence_of(candidate, tmp_path / "plain", None, key)
    path = write_trust(key)
    assert [verify(candidate, one, load_trust(path)).verdict for one in (drawn, plain)] == ["passed", "passed"]
    path.write_text(f"{path.read_text()}drawn = true\n")
    found = present(verify(candidate, drawn, load_trust(path)).statistics.draw)
    assert found.keyid == read_signer(key).public_key.keyid
    with pytest.raises(NotAttested, match=r"report\.json: the order follows from digests alone; gate with --key"):
        verify(candidate, plain, load_trust(path))
    sign_evidence(drawn, [read_signer(other)])  # a second signer, who did not draw
    assert verify(candidate, drawn, trusting(other)).verdict == "passed"
    with pytest.raises(NotAttested, match="drew the order, and is none that is trusted and signed"):
        verify(candidate, drawn, trusting(other, drawn=True))


def test_an_order_that_only_claims_a_key_is_refused(candidate: Path, tmp_path: Path) -> None:
    """A signature of another file, or one that was tried until the order pleased: by `sign` and by `verify`."""
    key = make_key(tmp_path, "release")
    for name, signature in (
        ("another", Draw.by(read_signer(key), MATTER).signature),
        ("made up", "0123456789abcdef" * 8),
    ):
        draw = Draw(read_signer(key).public_key.keyid, signature)
        claimed = evidence_of(candidate, tmp_path / name, draw, key)
        with pytest.raises(NotAttested, match="did not draw the order that names it"):
            verify(candidate, claimed, trusting(key))
        with pytest.raises(NotAttested, match="did not draw the order that names it"):
            sign_evidence(claimed, [read_signer(key)])
