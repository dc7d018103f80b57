"""A server that asks for model.sig: it copies the signature with the files, and serves nothing without."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmcl.common.errors import DfmclError
from dfmcl.gating.signing.keys import read_signer
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.promotion import promote
from dfmcl.release.stores.directory import Directory
from tests.serving.workshop import Served
from tests.signing import ec_key


def test_serve_asks_for_model_sig(
    needs_triton: None, candidate: Path, evidence: Path, trust_file: Path, tmp_path: Path
) -> None:
    """`serve --trust` with model_keys: refused as it was promoted without, served once promotion signed."""
    key = ec_key(tmp_path)
    text = trust_file.read_text().replace('"release.pub"', f'"{trust_file.with_suffix(".pub")}"')
    (tmp_path / "attested.toml").write_text(text)
    (tmp_path / "both.toml").write_text(f'{text}model_keys = ["{key.with_suffix(".pub").name}"]\n')
    attested, both = (load_trust(tmp_path / name) for name in ("attested.toml", "both.toml"))
    store = Directory(tmp_path / "models")
    promote(candidate, evidence, store, name="digits", trust=attested, threads=1)
    with pytest.raises(DfmclError, match=r"model\.sig: no such file"):
        Served(tmp_path / "models", tmp_path / "ready.json", trust=both).start()
    promote(candidate, evidence, store, name="digits", trust=both, threads=1, signer=read_signer(key))
    server = Served(tmp_path / "models", tmp_path / "ready.json", trust=both).start()
    try:
        assert [path.parent.name for path in server.private.rglob("model.sig")] == ["2"]
    finally:
        assert server.close() == 0
