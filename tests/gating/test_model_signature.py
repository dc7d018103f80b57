"""model.sig: what OpenSSF's own tool accepts and refuses, and whom a trust file believes by it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.gating.schema import PREDICATE
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, sign_evidence, sign_model, verify
from dfmcl.gating.signing.evidence import ATTESTATION, REPORT, SIGNATURE, file_digest
from dfmcl.gating.signing.keys import read_public, read_signer
from dfmcl.gating.signing.model_signature import model_signature, read_model_signature
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.promotion import promote
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from tests.deploying import tool
from tests.signing import code_of, ec_key, make_key

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_repository" / "resnet18-cifar10" / "1"
MASTER = ROOT / "deploy" / "resnet18-cifar10" / "release.pub"
FILES = {"model.onnx", "labels.txt", "manifest.json", REPORT, "probes.npz", ATTESTATION}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped release, which its maker's ed25519 key attested, signed as a whole by a key of ours."""
    home = tmp_path_factory.mktemp("model-signature")
    ec_key(home)
    ec_key(home, "other")
    shutil.copy(MASTER, home / "release.pub")
    (home / "attested.toml").write_text('keys = ["release.pub"]\n')
    (home / "model.toml").write_text('model_keys = ["model.pub"]\n')
    (home / "both.toml").write_text('keys = ["release.pub"]\nmodel_keys = ["other.pub", "model.pub"]\n')
    (home / "stranger.toml").write_text('keys = ["release.pub"]\nmodel_keys = ["other.pub"]\n')
    shutil.copytree(SHIPPED, home / "v")
    sign_model(home / "v", read_signer(home / "model.key"))
    return home


@pytest.fixture
def place(signed: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled; what is large is the same file, and is replaced where it is changed."""

    def copied(source: str, target: str) -> None:
        (os.link if source.endswith((".onnx", ".npz")) else shutil.copy)(source, target)

    return shutil.copytree(signed, tmp_path / "home", copy_function=copied)


def by_their_tool(verb: str, directory: Path, key: Path) -> subprocess.CompletedProcess[str]:
    option = "--private_key" if verb == "sign" else "--public_key"
    words = [tool("model_signing"), verb, "key", directory.name, "--signature", f"{directory.name}/{SIGNATURE}"]
    made = subprocess.run([*words, option, str(key)], cwd=directory.parent, capture_output=True, text=True, check=False)
    assert "Traceback" not in made.stderr
    return made


def test_their_tool_accepts_the_directory_as_it_lies(signed: Path) -> None:
    """Whoever has only `model_signing` can check a release of ours, by the public key."""
    found = by_their_tool("verify", signed / "v", signed / "model.pub")
    assert (found.returncode, found.stdout) == (0, "Verification succeeded\n")
    assert by_their_tool("verify", signed / "v", signed / "other.pub").returncode == 1
    assert set(read_model_signature(signed / "v" / SIGNATURE).files) == FILES == {p.name for p in SHIPPED.iterdir()}


@pytest.mark.parametrize("name", sorted(FILES))
def test_both_name_an_edited_file(place: Path, name: str) -> None:
    """Their tool and `dfmcl verify` find the same one byte more."""
    edited = (place / "v" / name).read_bytes() + b"\n"
    (place / "v" / name).unlink()
    (place / "v" / name).write_bytes(edited)
    found = by_their_tool("verify", place / "v", place / "model.pub")
    assert found.returncode == 1
    assert f"Hash mismatch for '{name}'" in found.stderr.replace("\\'", "'")
    with pytest.raises((NotAttested, BadEvidence), match=name):
        verify(place / "v", place / "v", load_trust(place / "model.toml"))


def test_both_name_an_extra_file_and_one_less(place: Path) -> None:
    """Nothing lies in a release that nobody signed, and nothing is gone."""
    (place / "v" / "extra.bin").write_bytes(b"x")
    assert (
        "Extra files found in model 'v': extra.bin" in by_their_tool("verify", place / "v", place / "model.pub").stderr
    )
    with pytest.raises(NotAttested, match=r"extra\.bin: was not judged"):
        verify(place / "v", place / "v", load_trust(place / "both.toml"))
    (place / "v" / "extra.bin").unlink()
    (place / "v" / "labels.txt").unlink()
    assert "Missing files in model 'v': labels.txt" in by_their_tool("verify", place / "v", place / "model.pub").stderr
    with pytest.raises(BadEvidence, match=r"labels\.txt"):
        verify(place / "v", place / "v", load_trust(place / "both.toml"))


def test_whoever_signs_with_their_tool_can_be_trusted(place: Path) -> None:
    """`model_signing sign key` over the directory, `model_keys` in the trust file, and nothing else of ours."""
    (place / "v" / SIGNATURE).unlink()
    assert code_of("verify", str(place / "v"), "--trust", str(place / "both.toml")) == 1
    made = by_their_tool("sign", place / "v", place / "model.key")
    assert made.returncode == 0, made.stderr
    assert code_of("verify", str(place / "v"), "--trust", str(place / "both.toml")) == 0
    assert code_of("verify", str(place / "v"), "--trust", str(place / "stranger.toml")) == 1


@pytest.mark.parametrize(
    ("trust", "without", "code"),
    [
        ("attested", None, 0),
        ("model", None, 0),
        ("both", None, 0),
        ("stranger", None, 1),
        ("attested", SIGNATURE, 0),
        ("model", SIGNATURE, 1),
        ("both", SIGNATURE, 1),
        ("attested", "signatures", 1),
        ("both", "signatures", 1),
    ],
)
def test_a_trust_file_asks_for_either_or_both(
    place: Path, trust: str, without: str | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """keys: the attestation; model_keys: model.sig; what is asked for and missing is refused."""
    if without == SIGNATURE:
        (place / "v" / SIGNATURE).unlink()
    elif without:  # an attestation that nobody signed, under a model.sig that covers it
        lines = [json.loads(line) for line in (place / "v" / ATTESTATION).read_text().splitlines()]
        (place / "v" / ATTESTATION).write_text("".join(json.dumps({**line, "signatures": []}) + "\n" for line in lines))
        sign_model(place / "v", read_signer(place / "model.key"))
    assert code_of("verify", str(place / "v"), "--trust", str(place / f"{trust}.toml")) == code
    said = capsys.readouterr()
    assert ("signed by" in said.out) == (code == 0)
    if code == 0:
        keys = {"attested": {MASTER}, "model": {place / "model.pub"}, "both": {MASTER, place / "model.pub"}}[trust]
        assert all(read_public(key).keyid[:12] in said.out for key in keys)


def test_a_verdict_by_model_keys_alone_is_still_a_verdict(place: Path) -> None:
    """model.sig stands in for the attestation's signatures, not for policy, data, age or bytes."""
    digest = json.loads((place / "v" / REPORT).read_text())["policy"]["sha256"]
    for line, refused in {
        f'policies = ["{digest}"]': None,
        f'policies = ["{"a" * 64}"]': "policy",
        f'data = ["{"a" * 64}"]': "data",
    }.items():
        (place / "model.toml").write_text(f'model_keys = ["model.pub"]\n{line}\n')
        trust = load_trust(place / "model.toml")
        if refused is None:
            assert verify(place / "v", place / "v", trust).verdict == "passed"
            continue
        with pytest.raises(NotAttested) as caught:
            verify(place / "v", place / "v", trust)
        assert caught.value.fault == refused


def bundle(place: Path) -> dict[str, Any]:
    return json.loads((place / "v" / SIGNATURE).read_text())


def again(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another statement under the old signature."""
    found = bundle(place)
    statement = json.loads(base64.b64decode(found["dsseEnvelope"]["payload"]))
    change(statement)
    found["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (place / "v" / SIGNATURE).write_text(json.dumps(found))


def put(place: Path, **parts: Any) -> None:
    (place / "v" / SIGNATURE).write_text(json.dumps({**bundle(place), **parts}))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda place: (place / "v" / SIGNATURE).write_text("{"), "envelope"),
    "a list": (lambda place: (place / "v" / SIGNATURE).write_text("[]"), "envelope"),
    "another media type": (lambda place: put(place, mediaType="application/zip"), "envelope"),
    "no envelope": (lambda place: put(place, dsseEnvelope={}), "envelope"),
    "no signature": (
        lambda place: put(place, dsseEnvelope={**bundle(place)["dsseEnvelope"], "signatures": []}),
        "envelope",
    ),
    "a signature twice": (
        lambda place: put(
            place, dsseEnvelope={**(one := bundle(place)["dsseEnvelope"]), "signatures": one["signatures"] * 2}
        ),
        "envelope",
    ),
    "another predicate": (lambda place: again(place, lambda one: one.update(predicateType="x")), "envelope"),
    "by shards": (
        lambda place: again(place, lambda one: one["predicate"]["serialization"].update(method="shards")),
        "envelope",
    ),
    "by blake3": (
        lambda place: again(place, lambda one: one["predicate"]["resources"][0].update(algorithm="blake3")),
        "envelope",
    ),
    "another root": (
        lambda place: again(place, lambda one: one["subject"][0]["digest"].update(sha256="0" * 64)),
        "envelope",
    ),
    "a file less": (lambda place: again(place, lambda one: one["predicate"]["resources"].pop()), "envelope"),
    "a payload that nobody signed": (
        lambda place: again(place, lambda one: one["subject"][0].update(name="x")),
        "signers",
    ),
    "signed by another": (lambda place: sign_model(place / "v", read_signer(place / "other.key")), "signers"),
    "signed for more files": (
        lambda place: (place / "v" / SIGNATURE).write_text(
            model_signature(
                {**{name: file_digest(place / "v" / name) for name in FILES}, "more": "0" * 64},
                "v",
                read_signer(place / "model.key"),
            )
        ),
        "listed",
    ),
    "signed without the model": (
        lambda place: (place / "v" / SIGNATURE).write_text(
            model_signature(
                {name: file_digest(place / "v" / name) for name in FILES - {"model.onnx"}},
                "v",
                read_signer(place / "model.key"),
            )
        ),
        "listed",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_signature_is_refused(place: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with its fault's exit code; also where the attestation beside it holds."""
    spoil, fault = SPOILT[how]
    spoil(place)
    with pytest.raises((NotAttested, BadEvidence)) as caught:
        verify(
            place / "v",
            place / "v",
            load_trust(place / "both.toml" if how != "signed by another" else place / "model.toml"),
        )
    assert caught.value.fault == fault
    assert SIGNATURE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_promotion_signs_what_it_wrote(place: Path, tmp_path: Path) -> None:
    """`dfmcl promote --key`: model.sig lies in the version, their tool accepts it, and a trust file may ask for it."""
    (place / "v" / SIGNATURE).unlink()
    common = ["--evidence", str(place / "v"), "--repository", str(tmp_path / "models"), "--name", "cifar"]
    trust = ["--trust", str(place / "both.toml")]
    assert code_of("promote", str(place / "v"), *common, *trust) == 1  # asked for, and nobody signs
    assert not (tmp_path / "models" / "cifar").exists()
    assert code_of("promote", str(place / "v"), *common, *trust, "--key", str(place / "other.key")) == 0
    assert code_of("promote", str(place / "v"), *common, *trust, "--key", str(place / "model.key")) == 0
    version = tmp_path / "models" / "cifar" / "2"
    assert by_their_tool("verify", version, place / "model.pub").returncode == 0
    assert verify_release(Directory(tmp_path / "models"), "cifar", load_trust(place / "both.toml")).version == 2
    assert code_of("verify", str(tmp_path / "models" / "cifar"), *trust) == 0
    assert code_of("status", "--repository", str(tmp_path / "models"), *trust) == 0


def test_promotion_by_a_wrong_key_leaves_nothing(place: Path, tmp_path: Path) -> None:
    """A key that cannot, or may not, sign what the trust file asks for: refused before anything has a name."""
    store = Directory(tmp_path / "models")
    (place / "v" / SIGNATURE).unlink()
    trust = load_trust(place / "both.toml")
    with pytest.raises(BadInput, match=r"is ed25519; model\.sig needs an ECDSA key on P-256"):
        promote(place / "v", place / "v", store, name="cifar", trust=trust, signer=read_signer(make_key(tmp_path)))
    ec_key(tmp_path, "nobody")
    with pytest.raises(NotAttested, match=r"model\.sig: none of the 2 keys in model_keys signed it"):
        promote(place / "v", place / "v", store, name="cifar", trust=trust, signer=read_signer(tmp_path / "nobody.key"))
    assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")] == []


def test_promotion_takes_the_evidences_signature_along(place: Path, tmp_path: Path) -> None:
    """Signed where the gate ran, with `dfmcl sign`, and promoted elsewhere; one about other files stays out."""
    store, trust = Directory(tmp_path / "models"), load_trust(place / "attested.toml")
    assert (promote(place / "v", place / "v", store, name="cifar", trust=trust).path / SIGNATURE).is_file()
    again(place, lambda one: one["subject"][0].update(name="x"))  # nobody asks who signed
    promote(place / "v", place / "v", store, name="cifar", trust=trust)
    stale = {name: file_digest(place / "v" / name) for name in FILES - {ATTESTATION}}
    (place / "v" / SIGNATURE).write_text(model_signature(stale, "v", read_signer(place / "model.key")))
    with pytest.raises(NotAttested, match=r"model\.sig: does not list attestation"):
        promote(place / "v", place / "v", store, name="cifar", trust=trust)


def test_a_second_signature_makes_a_new_one(place: Path) -> None:
    """A further signer changes the attestation: model.sig follows with its key, and is not left behind without."""
    before = (place / "v" / SIGNATURE).read_bytes()
    with pytest.raises(BadInput, match=r"model\.sig: would no longer be about the attestation; sign with its key, too"):
        sign_evidence(place / "v", [read_signer(make_key(place, "second"))])
    assert (place / "v" / SIGNATURE).read_bytes() == before
    sign_evidence(place / "v", [read_signer(place / "second.key"), read_signer(place / "model.key")])
    assert verify(place / "v", place / "v", load_trust(place / "both.toml")).verdict == "passed"
    assert by_their_tool("verify", place / "v", place / "model.pub").returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model_keys = []", "model_keys: List should have at least 1 item"),
        ('model_keys = ["release.pub"]', "is ed25519; model.sig needs an ECDSA key on P-256"),
        ('model_keys = ["model.pub"]\nthreshold = 2', "threshold is about keys, and none is listed"),
        ('model_keys = ["model.pub"]\ndrawn = true', "drawn is about keys, and none is listed"),
        ("max_age_days = 3", "trusts nobody; list keys, whose attestation counts, or model_keys"),
    ],
)
def test_a_trust_file_that_asks_for_the_impossible_is_refused(place: Path, text: str, reason: str) -> None:
    """Where it is read, not where it lets everybody pass or nobody."""
    (place / "odd.toml").write_text(text)
    with pytest.raises(BadInput) as caught:
        load_trust(place / "odd.toml")
    assert reason in str(caught.value)


def test_verify_tells_machines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json`: who signed, until when, the predicate of the published schema; of a refusal, the fault."""
    words = ("verify", str(place / "v"), "--json", "--trust")
    assert code_of(*words, str(place / "both.toml")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verified"], set(found["subject"])) == (True, {"model.onnx", "labels.txt", "manifest.json"})
    assert set(found["signers"]) == {read_public(key).keyid for key in (MASTER, place / "model.pub")}
    jsonschema.validate(found["predicate"], json.loads(PREDICATE.read_text()))
    assert found["expires"] == found["predicate"]["expires"]
    assert code_of(*words, str(place / "stranger.toml")) == 1
    said = capsys.readouterr()
    refused = json.loads(said.out)
    assert (refused["verified"], refused["fault"]) == (False, "signers")
    assert said.err == f"dfmcl: {refused['reason']}\n"
    assert code_of("verify", str(place / "v"), "--json", "--trust", str(place / "none.toml")) == 2
    assert json.loads(capsys.readouterr().out)["fault"] is None
