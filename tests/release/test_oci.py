"""`dfmcl push` and `pull` with a real registry: the commands, and whatever stands in a registry or in the way."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dfmcl.release.oci.registry
from dfmcl.common.errors import BadInput
from dfmcl.common.reader import Unfit
from dfmcl.gating.signing.attestation import sign_evidence
from dfmcl.gating.signing.keys import read_signer
from dfmcl.release.oci.artifact import (
    CREATED,
    EVIDENCE_TYPE,
    FILEPATH,
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    MODEL_CONFIG,
    MODEL_TYPE,
    SIGNATURE_TYPE,
    TITLE,
    Descriptor,
)
from dfmcl.release.oci.pull import pull
from dfmcl.release.oci.push import push
from dfmcl.release.oci.reference import parse_reference
from tests.oci import (
    PASSWORD,
    PASSWORDS,
    TOKENS,
    USER,
    RegistryServer,
    door_before,
    issuer_of_tokens,
    registry_server,
)
from tests.serving.workshop import write_evidence
from tests.signing import code_of, ec_key, sign_again

FILES = {"model.onnx", "labels.txt", "manifest.json", "report.json", "probes.npz", "attestation.intoto.jsonl"}
NAME = "team/digits"
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nobodys_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests read no credentials of their user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "ORAS_USER", "ORAS_PASS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def place(registry: RegistryServer) -> str:
    """Where the tests' release goes."""
    return f"oci://{registry.host}/{NAME}"


@pytest.fixture
def pushed(place: str, candidate: Path, evidence: Path) -> str:
    """A release in the registry, by digest; also as the tag `1`."""
    return str(push(candidate, evidence, parse_reference(f"{place}:1")).reference)


@pytest.fixture
def other(candidate: Path, tmp_path: Path) -> Path:
    """Another candidate: exported a year later, as its manifest says."""
    folder = shutil.copytree(candidate, tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["created"] = "2031" + manifest["created"][4:]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def layers_of(registry: RegistryServer, reference: str) -> dict[str, Any]:
    """A manifest's layers by title."""
    return {row["annotations"][TITLE]: row for row in registry.get(NAME, digest(reference))["layers"]}


def digest(reference: str) -> str:
    return reference.partition("@")[2]


def referrers(registry: RegistryServer, reference: str) -> list[Any]:
    return list(registry.get(NAME, digest(reference).replace(":", "-"), IMAGE_INDEX)["manifests"])


def require_nothing(folder: Path) -> None:
    """A pull that failed leaves neither a directory nor a part of one, nor its lock."""
    assert [path.name for path in folder.iterdir() if "out" in path.name] == []


def test_what_is_pulled_is_verified_and_promoted_as_it_is(
    place: str, candidate: Path, evidence: Path, trust_file: Path, tmp_path: Path, capsys: Output
) -> None:
    """By the commands: on stdout is the reference alone; by it the same bytes come back, with all that vouches."""
    out, models = tmp_path / "out", tmp_path / "models"
    assert code_of("push", str(candidate), f"{place}:1", "--evidence", str(evidence)) == 0
    told = capsys.readouterr()
    reference = told.out.strip()
    assert parse_reference(reference).digest
    assert f"{place}:1: model.onnx " in told.err
    assert code_of("pull", reference, str(out)) == 0
    assert f"{out}: {reference}, model.onnx " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.iterdir():
        source = candidate if (candidate / path.name).exists() else evidence
        assert path.read_bytes() == (source / path.name).read_bytes(), path.name
    assert code_of("verify", str(out), "--trust", str(trust_file)) == 0
    where = ["--repository", str(models), "--name", "digits", "--trust", str(trust_file)]
    assert code_of("promote", str(out), "--evidence", str(out), *where) == 0
    assert code_of("push", str(models / "digits" / "1"), f"{place}:promoted") == 0
    assert capsys.readouterr().out.strip().endswith(reference), "a promoted version is its own evidence"


def test_a_tag_says_which_digest_it_is_and_may_be_moved(
    pushed: str, place: str, other: Path, key: Path, tmp_path: Path, capsys: Output
) -> None:
    """By the digest the first release comes as before."""
    push(other, write_evidence(tmp_path / "evidence", other, key), parse_reference(f"{place}:1"))
    assert code_of("pull", f"{place}:1", str(tmp_path / "out")) == 0
    moved = capsys.readouterr().out
    assert pushed not in moved
    assert f"{place}@sha256:" in moved
    assert code_of("pull", pushed, str(tmp_path / "first")) == 0
    assert code_of("pull", f"{place}:1@{digest(pushed)}", str(tmp_path / "both")) == 0, "the digest decides"
    said = [(tmp_path / name / "manifest.json").read_bytes() for name in ("out", "first", "both")]
    assert said[0] != said[1] == said[2]


def test_the_digest_follows_from_the_candidates_bytes_alone(
    pushed: str, place: str, candidate: Path, evidence: Path, other: Path, key: Path, tmp_path: Path
) -> None:
    """Another copy at another time, under another name, is the same; other bytes are another one."""
    copy = shutil.copytree(candidate, tmp_path / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    assert digest(str(push(copy, evidence, parse_reference(f"{place}-again")).reference)) == digest(pushed)
    assert str(push(copy, evidence, parse_reference(place)).reference) == pushed
    second = push(other, write_evidence(tmp_path / "e", other, key), parse_reference(place)).reference
    assert second.digest != digest(pushed)


def test_evidence_that_is_pushed_again_is_listed_once(
    pushed: str, registry: RegistryServer, place: str, candidate: Path, evidence: Path
) -> None:
    """So that the newest is the only one."""
    before = referrers(registry, pushed)
    push(candidate, evidence, parse_reference(place))
    assert referrers(registry, pushed) == before
    assert [row["artifactType"] for row in before] == [EVIDENCE_TYPE]


def test_it_is_a_modelpack_artifact(pushed: str, registry: RegistryServer, candidate: Path) -> None:
    """As its specification asks: types, a file a layer as it is, and a config that lists them."""
    manifest = registry.get(NAME, "1")
    assert (manifest["mediaType"], manifest["artifactType"]) == (IMAGE_MANIFEST, MODEL_TYPE)
    assert manifest["config"]["mediaType"] == MODEL_CONFIG
    config = json.loads(registry.blob(manifest["config"]["digest"]).read_bytes())
    assert config.keys() == {"descriptor", "config", "modelfs"}
    assert config["config"]["format"] == "onnx"
    assert config["modelfs"] == {"type": "layers", "diffIds": [row["digest"] for row in manifest["layers"]]}
    kinds = {row["annotations"][FILEPATH]: row["mediaType"] for row in manifest["layers"]}
    assert kinds == {
        "model.onnx": "application/vnd.cncf.model.weight.v1.raw",
        "labels.txt": "application/vnd.cncf.model.weight.config.v1.raw",
        "manifest.json": "application/vnd.cncf.model.weight.config.v1.raw",
    }


def test_another_client_reads_it(pushed: str, registry: RegistryServer, candidate: Path, tmp_path: Path) -> None:
    """oras's own pull, which knows nothing of ours."""
    from oras.client import OrasClient

    got = OrasClient(hostname=registry.host, insecure=True).pull(f"{registry.host}/{NAME}:1", outdir=str(tmp_path))
    assert {Path(path).name for path in got} == {"model.onnx", "labels.txt", "manifest.json"}
    assert (tmp_path / "model.onnx").read_bytes() == (candidate / "model.onnx").read_bytes()


def test_model_sig_comes_along_and_is_found_by_its_type(
    registry: RegistryServer, place: str, candidate: Path, evidence: Path, key: Path, tmp_path: Path
) -> None:
    """With the evidence, and once more by itself for tools that look for signatures."""
    signed = shutil.copytree(evidence, tmp_path / "signed")
    sign_evidence(signed, [read_signer(ec_key(tmp_path / "keys"))])
    reference = push(candidate, signed, parse_reference(place)).reference
    pull(reference, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"model.sig"}
    [alone] = [row for row in referrers(registry, str(reference)) if row["artifactType"] == SIGNATURE_TYPE]
    manifest = registry.get(NAME, alone["digest"])
    assert manifest["subject"]["digest"] == reference.digest
    assert registry.blob(manifest["layers"][0]["digest"]).read_bytes() == (signed / "model.sig").read_bytes()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("how", ["changed", "cut", "longer"])
def test_other_bytes_in_the_registry_are_refused(
    pushed: str, registry: RegistryServer, tmp_path: Path, capsys: Output, name: str, how: str
) -> None:
    """Of each file, on the registry's own disk; with 1, and nothing is left."""
    [entry] = referrers(registry, pushed)
    row = (layers_of(registry, pushed) | layers_of(registry, f"@{entry['digest']}"))[name]
    path = registry.blob(row["digest"])
    whole = path.read_bytes()
    path.write_bytes({"changed": bytes([whole[0] ^ 1]) + whole[1:], "cut": whole[:-1], "longer": whole + b"\n"}[how])
    assert code_of("pull", pushed, str(tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert f"@{row['digest']}" in err
    assert name in err
    assert len(err.splitlines()) == 1
    require_nothing(tmp_path)


def test_another_manifest_under_the_digest_is_refused(
    pushed: str, place: str, registry: RegistryServer, other: Path, key: Path, tmp_path: Path, capsys: Output
) -> None:
    """A whole one, of another release: the digest in the reference is the identity."""
    second = push(other, write_evidence(tmp_path / "e", other, key), parse_reference(place)).reference
    shutil.copyfile(registry.blob(second.digest), registry.blob(digest(pushed)))
    assert code_of("pull", pushed, str(tmp_path / "out")) == 1
    assert f"the registry serves other bytes, whose digest is {second.digest}" in capsys.readouterr().err
    require_nothing(tmp_path)


def test_a_tag_that_was_moved_on_the_disk_names_its_digest(
    pushed: str, place: str, registry: RegistryServer, other: Path, key: Path, tmp_path: Path, capsys: Output
) -> None:
    """And with the digest the tag decides nothing."""
    second = push(other, write_evidence(tmp_path / "e", other, key), parse_reference(place)).reference
    registry.tag(NAME, "1").write_text(second.digest)
    assert code_of("pull", f"{place}:1", str(tmp_path / "moved")) == 0
    assert str(second) in capsys.readouterr().out
    assert code_of("pull", f"{place}:1@{digest(pushed)}", str(tmp_path / "out")) == 0
    assert pushed in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1]["annotations"].update({TITLE: "../labels.txt"}), "'../labels.txt', and only model.onnx"),
        (lambda rows: rows[1]["annotations"].update({TITLE: "/etc/passwd"}), "'/etc/passwd', and only model.onnx"),
        (lambda rows: rows[1]["annotations"].update({TITLE: "model.onnx"}), "names model.onnx twice"),
        (lambda rows: rows[1].pop("annotations"), "names a file ''"),
        (lambda rows: rows.append(dict(rows[0], annotations={TITLE: "backend.so"})), "'backend.so', and only"),
        (lambda rows: rows.pop(1), "lacks labels.txt"),
        (lambda rows: rows[0].update(size=2**40), "has model.onnx of 1,099,511,627,776 bytes, and at most 4,294,967"),
        (lambda rows: rows[0].update(size=-1), "holds a size that is none: '-1'"),
        (lambda rows: rows[0].update(mediaType="application/vnd.cncf.model.weight.v1.tar"), "weight.v1.tar'"),
    ],
    ids=["up", "root", "twice", "nameless", "stranger", "absent", "large", "negative", "archive"],
)
def test_a_manifest_of_other_files_is_refused(
    pushed: str, place: str, registry: RegistryServer, tmp_path: Path, capsys: Output,
    change: Callable[[list[dict[str, Any]]], object], said: str,
) -> None:  # fmt: skip
    """With 2, before a byte is written: no title leads out of the directory, and nothing is larger than it may be."""
    manifest = registry.get(NAME, "1")
    change(manifest["layers"])
    registry.put(NAME, "bad", manifest)
    assert code_of("pull", f"{place}:bad", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    require_nothing(tmp_path)


def test_a_blob_of_another_size_than_its_manifest_says_is_refused(
    pushed: str, place: str, registry: RegistryServer, tmp_path: Path, capsys: Output
) -> None:
    """Though its digest is right: no more is read than was said."""
    [entry] = referrers(registry, pushed)
    for off, said in ((-1, "has more than its"), (1, "the registry serves other bytes for labels.txt")):
        manifest = registry.get(NAME, "1")
        manifest["layers"][1]["size"] += off
        size = len(json.dumps(manifest).encode())
        subject = {"mediaType": IMAGE_MANIFEST, "digest": registry.put(NAME, "odd", manifest), "size": size}
        about = registry.put(NAME, "about", registry.get(NAME, entry["digest"]) | {"subject": subject})
        assert code_of("pull", f"{place}:odd", str(tmp_path / "out"), "--evidence", about) == 1
        assert said in capsys.readouterr().err
        require_nothing(tmp_path)


def test_what_is_no_release_is_bad_input(
    pushed: str, place: str, registry: RegistryServer, tmp_path: Path, capsys: Output
) -> None:
    """An image, an index, which the registry holds back, evidence, a tag or a digest that is not there, neither."""
    image = {key: value for key, value in registry.get(NAME, "1").items() if key != "artifactType"}
    registry.put(NAME, "image", image)
    [entry] = referrers(registry, pushed)
    for reference, said in (
        (f"{place}:image", "expected 'application/vnd.cncf.model.manifest.v1+json'; `dfmcl push` writes it"),
        (f"{place}:{digest(pushed).replace(':', '-')}", "is not there"),
        (f"{place}@{entry['digest']}", "is 'application/vnd.dfmcl.evidence.v1', expected"),
        (f"{place}:2", f"{place}:2: is not there"),
        (f"{place}@sha256:{'0' * 64}", "is not there"),
        (f"{place}-elsewhere:1", "is not there"),
        (place, "name a tag or a digest"),
        (f"{place}@sha256:12", "write oci://HOST/NAME:TAG or"),
        (f"docker://{registry.host}/{NAME}:1", "write oci://HOST/NAME:TAG or"),
        (f"oci://{registry.host}/../{NAME}:1", "write oci://HOST/NAME:TAG or"),
        (f"oci://user:secret@{registry.host}/{NAME}:1", "write oci://HOST/NAME:TAG or"),
    ):
        assert code_of("pull", reference, str(tmp_path / "out")) == 2, reference
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    require_nothing(tmp_path)


def test_a_release_without_evidence_is_not_pulled(
    pushed: str, place: str, registry: RegistryServer, tmp_path: Path, capsys: Output
) -> None:
    """Its referrer is gone, or is one about another release, or lacks a file."""
    [entry] = referrers(registry, pushed)
    manifest = registry.get(NAME, "1") | {"annotations": {CREATED: "2020-01-01T00:00:00+00:00"}}
    registry.put(NAME, "alone", manifest)
    assert code_of("pull", f"{place}:alone", str(tmp_path / "out")) == 2
    assert "no evidence refers to it; `dfmcl push` brings it along" in capsys.readouterr().err
    assert code_of("pull", f"{place}:alone", str(tmp_path / "out"), "--evidence", entry["digest"]) == 2
    assert f"{place}@{entry['digest']}: refers to another manifest" in capsys.readouterr().err
    about = registry.get(NAME, entry["digest"])
    about["layers"].pop()
    bare = registry.put(NAME, "bare", about)
    assert code_of("pull", pushed, str(tmp_path / "out"), "--evidence", bare) == 2
    assert "lacks attestation.intoto.jsonl" in capsys.readouterr().err
    shutil.rmtree(registry.tag(NAME, digest(pushed).replace(":", "-")).parents[1])
    assert code_of("pull", pushed, str(tmp_path / "out")) == 2
    assert "no evidence refers to it" in capsys.readouterr().err
    require_nothing(tmp_path)


def test_a_list_of_referrers_that_is_none_is_told(
    pushed: str, registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Malformed, or longer than what is read, which is as much as this registry takes."""
    [entry], tag = referrers(registry, pushed), digest(pushed).replace(":", "-")
    index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [entry | {"size": -5}]}
    registry.put(NAME, tag, index, IMAGE_INDEX)
    assert code_of("pull", pushed, str(tmp_path / "out")) == 2
    assert f"{pushed}: its list of referrers holds a size that is none" in capsys.readouterr().err
    monkeypatch.setattr(dfmcl.release.oci.registry, "DOCUMENT_BYTES", 100)
    assert code_of("pull", pushed, str(tmp_path / "out")) == 2
    assert f"{pushed}: a manifest holds more than 100 bytes" in capsys.readouterr().err
    require_nothing(tmp_path)


def renewed(evidence: Path, folder: Path, key: Path, created: str) -> Path:
    """The evidence of a gate that ran at another time."""
    shutil.copytree(evidence, folder)
    sign_again(folder, key, created=created)
    return folder


def test_the_newest_evidence_comes_or_the_one_that_is_named(
    pushed: str, registry: RegistryServer, place: str, candidate: Path, evidence: Path, key: Path, tmp_path: Path,
    capsys: Output,
) -> None:  # fmt: skip
    """As each says itself; of two that are as new somebody must choose."""
    [first] = referrers(registry, pushed)
    new = renewed(evidence, tmp_path / "new", key, "2026-05-02T03:04:05+00:00")
    latest = push(candidate, new, parse_reference(place)).evidence
    old = renewed(evidence, tmp_path / "old", key, "2025-05-02T03:04:05+00:00")
    push(candidate, old, parse_reference(place))
    assert pull(parse_reference(pushed), tmp_path / "a").evidence == latest
    assert (tmp_path / "a" / "report.json").read_bytes() == (new / "report.json").read_bytes()
    assert pull(parse_reference(pushed), tmp_path / "b", evidence=first["digest"]).evidence == first["digest"]
    assert (tmp_path / "b" / "report.json").read_bytes() == (evidence / "report.json").read_bytes()
    sign_evidence(new, [read_signer(ec_key(tmp_path / "keys"))])
    twin = push(candidate, new, parse_reference(place)).evidence
    assert code_of("pull", pushed, str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert "name one by --evidence" in err
    assert twin in err
    assert latest in err
    assert first["digest"] not in err
    require_nothing(tmp_path)


def test_a_registry_that_lists_referrers_is_asked_for_them(
    registry: RegistryServer, candidate: Path, evidence: Path, key: Path, tmp_path: Path
) -> None:
    """As OCI 1.1 has it, page by page; no tag is written beside then."""
    with door_before(registry) as door:
        place = parse_reference(f"oci://{door.host}/{NAME}")
        old = push(candidate, renewed(evidence, tmp_path / "old", key, "2025-05-02T03:04:05+00:00"), place)
        new = push(candidate, evidence, place)
        assert len(door.referrers[new.reference.digest]) == 2
        assert not registry.tag(NAME, new.reference.digest.replace(":", "-")).exists()
        assert pull(new.reference, tmp_path / "out").evidence == new.evidence != old.evidence
        assert [line for line in door.asked if "page=1" in line]


def test_what_is_there_already_is_not_sent_again(registry: RegistryServer, candidate: Path, evidence: Path) -> None:
    with door_before(registry) as door:
        place = parse_reference(f"oci://{door.host}/{NAME}")
        push(candidate, evidence, place)
        assert len([line for line in door.asked if line.startswith("POST")]) == len(FILES) + 2, "config, empty config"
        door.asked.clear()
        push(candidate, evidence, place)
        assert not [line for line in door.asked if line.startswith("POST")]


def test_an_address_that_is_not_this_machines_is_never_asked_without_tls(
    pushed: str, registry: RegistryServer, candidate: Path, evidence: Path, tmp_path: Path, capsys: Output
) -> None:
    """127.1 is this machine, too, but not by a name that says so; and nobody is led there by a registry."""
    host = registry.host.replace("127.0.0.1", "127.1")
    there = pushed.replace(registry.host, host)
    assert code_of("pull", there, str(tmp_path / "out")) == 5
    assert "the registry does not answer" in capsys.readouterr().err
    assert code_of("pull", there, str(tmp_path / "plain"), "--plain-http") == 0
    with door_before(registry) as door:
        there = str(push(candidate, evidence, parse_reference(f"oci://{door.host}/{NAME}")).reference)
        door.moved = f"http://{host}"
        assert code_of("pull", there, str(tmp_path / "out")) == 2
        assert "leads to an address without TLS" in capsys.readouterr().err
        assert code_of("pull", there, str(tmp_path / "led"), "--plain-http") == 0
    require_nothing(tmp_path)


def test_a_registry_that_is_not_there_is_told_within_seconds(
    pushed: str, place: str, registry: RegistryServer, candidate: Path, evidence: Path, tmp_path: Path, capsys: Output
) -> None:
    """Broken, 5; and so is one that dies."""
    registry.process.kill()
    registry.process.wait()
    begun = time.monotonic()
    for arguments in (
        ["pull", pushed, str(tmp_path / "out")],
        ["push", str(candidate), place, "--evidence", str(evidence)],
    ):
        assert code_of(*arguments) == 5
        err = capsys.readouterr().err
        assert "the registry does not answer: " in err
        assert "Connection refused" in err
        assert len(err.splitlines()) == 1
    assert time.monotonic() - begun < 20
    require_nothing(tmp_path)


def test_a_registry_that_fails_is_told_at_once(
    pushed: str, registry: RegistryServer, candidate: Path, evidence: Path, tmp_path: Path, capsys: Output
) -> None:
    """Broken, 5, in its own words; oras by itself would ask for two minutes."""
    with door_before(registry) as door:
        door.fails, begun = True, time.monotonic()
        new = ["push", str(candidate), f"oci://{door.host}/{NAME}", "--evidence", str(evidence)]
        for arguments in (["pull", pushed.replace(registry.host, door.host), str(tmp_path / "out")], new):
            assert code_of(*arguments) == 5
            assert "the registry says 500: out of luck" in capsys.readouterr().err
        assert time.monotonic() - begun < 60
        assert len(door.asked) == 2 + 3, "each asks who is there, then once; push asks first whether a blob is there"
    require_nothing(tmp_path)


def test_an_existing_directory_is_refused(pushed: str, tmp_path: Path, capsys: Output) -> None:
    """An empty one, a file, a link to nowhere: each stays as it is."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert code_of("pull", pushed, str(tmp_path / name)) == 2
        assert "is there already; name a new directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


def test_what_has_not_passed_is_not_pushed(
    registry: RegistryServer, place: str, candidate: Path, evidence: Path, other: Path, key: Path, tmp_path: Path,
    capsys: Output,
) -> None:  # fmt: skip
    """Nor what nobody signed, nor evidence about other bytes: with the codes of `dfmcl verify`, and nothing is sent."""
    unsigned = shutil.copytree(evidence, tmp_path / "unsigned")
    (unsigned / "attestation.intoto.jsonl").unlink()
    failed = write_evidence(tmp_path / "failed", candidate, key, "failed")
    edited = shutil.copytree(candidate, tmp_path / "edited")
    (edited / "labels.txt").write_text("zero\n")
    partly = shutil.copytree(evidence, tmp_path / "partly")
    sign_evidence(partly, [read_signer(ec_key(tmp_path / "keys"))])
    shutil.copyfile(evidence / "attestation.intoto.jsonl", partly / "attestation.intoto.jsonl")
    for subject, about, code, said in (
        (candidate, unsigned, 1, "attestation.intoto.jsonl: no such file"),
        (candidate, failed, 1, "the verdict is 'failed'"),
        (candidate, partly, 1, "model.sig: was made over another attestation.intoto.jsonl"),
        (other, evidence, 1, "is not what the gate judged"),
        (edited, evidence, 1, "is not what the gate judged"),
        (candidate, tmp_path / "nowhere", 2, "report.json"),
        (tmp_path / "nowhere", evidence, 2, "nowhere: No such file or directory"),
    ):
        assert code_of("push", str(subject), f"{place}:1", "--evidence", str(about)) == code, said
        assert said in capsys.readouterr().err
    assert code_of("push", str(candidate), f"{place}@sha256:{'0' * 64}", "--evidence", str(evidence)) == 2
    assert "the digest follows from the candidate" in capsys.readouterr().err
    assert not (registry.folder / "docker").exists()


def test_credentials_are_those_of_the_platform(
    candidate: Path, evidence: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: Output,
) -> None:  # fmt: skip
    """What `docker login` leaves, wherever DOCKER_CONFIG says, or oras's variables; wrong or none: one line, and 2."""
    with registry_server(tmp_path_factory.mktemp("closed"), PASSWORDS) as server:
        new = ["push", str(candidate), f"oci://{server.host}/{NAME}:1", "--evidence", str(evidence)]

        def refused() -> None:
            assert code_of(*new) == 2
            err = capsys.readouterr().err
            assert "credentials may not do this, or there are none: `docker login`" in err
            assert len(err.splitlines()) == 1

        refused()
        home, auth = tmp_path / ".docker", "cm9iaW46c2VjcmV0"
        assert (USER, PASSWORD) == ("robin", "secret"), "in base64 above"
        home.mkdir()
        for text in ("{", "[]", json.dumps({"auths": {server.host: {"auth": "cm9iaW46d3Jvbmc="}}})):
            (home / "config.json").write_text(text)
            refused()
        (home / "config.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
        assert code_of(*new) == 0
        capsys.readouterr()
        home.rename(tmp_path / "elsewhere")
        refused()
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
        assert code_of("pull", new[2], str(tmp_path / "out")) == 0
        monkeypatch.delenv("DOCKER_CONFIG")
        monkeypatch.setenv("ORAS_USER", USER)
        monkeypatch.setenv("ORAS_PASS", PASSWORD)
        assert code_of(*new) == 0


def test_a_token_for_reading_is_changed_for_one_to_write(
    candidate: Path, evidence: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: Output,
) -> None:  # fmt: skip
    """As most registries let in: each question names the scope that it needs; pull asks for no more than to read."""
    folder = tmp_path_factory.mktemp("tokens")
    with issuer_of_tokens(folder) as (issuer, scopes), registry_server(folder, TOKENS, issuer) as server:
        place = f"oci://{server.host}/{NAME}:1"
        new = ["push", str(candidate), place, "--evidence", str(evidence), "--plain-http"]
        assert code_of(*new) == 2
        assert "credentials may not do this" in capsys.readouterr().err
        assert code_of(*new[:-1]) == 2
        assert "leads to an address without TLS" in capsys.readouterr().err
        monkeypatch.setenv("ORAS_USER", USER)
        monkeypatch.setenv("ORAS_PASS", PASSWORD)
        assert code_of(*new) == 0
        # oras keeps a scope's actions in a set, whose order is another in each process.
        assert [
            (where, set(actions.split(","))) for where, _, actions in (scope.rpartition(":") for scope in scopes)
        ] == [
            (f"repository:{NAME}", {"pull"}),
            (f"repository:{NAME}", {"pull", "push"}),
        ]
        scopes.clear()
        assert code_of("pull", place, str(tmp_path / "out"), "--plain-http") == 0
        assert scopes == [f"repository:{NAME}:pull"]


def test_without_oras_one_line_says_what_to_install(
    candidate: Path, evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """With 2, by both commands."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "oras"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "oras", None)
    for arguments in (
        ["push", str(candidate), "oci://registry.example/m", "--evidence", str(evidence)],
        ["pull", "oci://registry.example/m:1", str(tmp_path / "out")],
    ):
        assert code_of(*arguments) == 2
        err = capsys.readouterr().err
        assert "is not installed; pip install 'dfmcl[oci]'" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"annotations": {TITLE: 7}}, "holds annotations that are no texts"),
        ({"annotations": [TITLE]}, "holds annotations that are no texts"),
        ({"digest": "sha512:" + "0" * 128}, "holds a digest that is no SHA-256"),
        ({"digest": "sha256:../../etc"}, "holds a digest that is no SHA-256"),
        ({"digest": None}, "holds a digest that is no SHA-256"),
        ({"size": 1.5}, "holds a size that is none"),
        ({"size": True}, "holds a size that is none"),
    ],
)
def test_a_descriptor_that_no_registry_should_take_is_refused(row: dict[str, Any], said: str) -> None:
    """By us, too: not every registry is as strict as the one of these tests."""
    whole = {"mediaType": "text/plain", "digest": f"sha256:{'0' * 64}", "size": 1}
    assert Descriptor.from_json(whole).to_json() == whole
    with pytest.raises(Unfit, match=said):
        Descriptor.from_json(whole | row)
    for name in whole:
        with pytest.raises(Unfit, match="lacks mediaType, digest or size"):
            Descriptor.from_json({key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize(
    "text",
    [
        "oci://registry.example/team/digits",
        "oci://registry.example:5000/team/digits:v1.2_3",
        f"oci://[::1]:5000/a__b/c-d.e@sha256:{'a' * 64}",
        f"oci://localhost/m:1@sha256:{'0' * 64}",
    ],
)
def test_a_reference_is_what_it_was_written_as(text: str) -> None:
    assert str(parse_reference(text)) == text


@pytest.mark.parametrize("name", ["M", "a//b", "a/", "../a", "a/../b", "a:b:c", "a@b", "a b", "a?b", "a#b", "", "a%2e"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    """What would be another path of the registry, or a query."""
    with pytest.raises(BadInput, match="write oci://HOST/NAME"):
        parse_reference(f"oci://registry.example/{name}")
