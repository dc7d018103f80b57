"""A second execution provider, for real: OpenVINO on the CPU decides, serves, and is what parity compares with.

`make setup-openvino` makes its environment: the gate's packages and Triton's, behind another package of ONNX Runtime.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dfmcl.common.errors import DfmclError
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.serving.clients.triton import Client
from tests.exports import Export
from tests.networks import Networks
from tests.serving.workshop import Served
from tests.signing import code_of, make_key, policy_of, write_trust

ROOT = Path(__file__).parents[2]
GATE, TRITON = ROOT / ".venv-openvino" / "bin" / "python", ROOT / ".venv-openvino" / "triton" / "bin" / "python"
ROUNDS = 1e-4  # of the largest logit: float32 in another order is off by less, bfloat16 by more

pytestmark = pytest.mark.skipif(not GATE.exists(), reason=f"{GATE}: not there; `make setup-openvino` makes it")


def with_openvino(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of dfmcl in the environment that has OpenVINO."""
    words = [str(GATE), "-m", "dfmcl", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_openvino_decided_openvino_serves(
    precision: str,
    tmp_path: Path,
    networks: Networks,
    export_once: Export,
    monkeypatch: pytest.MonkeyPatch,
    needs_triton: None,
) -> None:
    """Gate, promote, serve, replay and parity by the provider that the policy names; by no other, in any of them."""
    candidate = export_once(networks("hardened"), tmp_path / "candidate")
    key, out = make_key(tmp_path), tmp_path / "evidence"
    policy = tmp_path / "gate.toml"
    text = policy_of(
        ["robust_accuracy >= 0.1 at 95 %"],
        threat={"eps": "4/255"},
        attacks={"suite": ["apgd-ce-10"], "substitute": 0},
        data={"name": "digits", "images": 48},
        checks={"images": 32},
        decide={"provider": "openvino", "precision": precision},
    ).to_toml()
    policy.write_text(text)
    arguments = ("gate", candidate, "--policy", policy, "--key", key, "--out", out)
    assert code_of(*map(str, arguments)) == 2, "this environment has no OpenVINO"
    done = with_openvino(*arguments)
    if precision == "bf16" and "no units for fewer bits" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    decided = json.loads((out / "report.json").read_text())["decided"]
    assert {**decided, "library": decided["library"][:4]} == {
        "provider": "openvino", "precision": precision, "tf32": False, "runtime": "onnxruntime-openvino 1.24.1",
        "library": "2025",
    }  # fmt: skip

    trust = write_trust(key)
    trust.write_text(f'{trust.read_text()}providers = ["openvino"]\n')
    models = tmp_path / "models"
    words = ("promote", candidate, "--evidence", out, "--repository", models, "--name", "digits", "--trust", trust)
    assert code_of(*map(str, (*words, "--threads", "1"))) in (0, None)
    assert "OpenVINOExecutionProvider" in (models / "digits" / "config.pbtxt").read_text()

    with pytest.raises(DfmclError, match="OpenVINOExecutionProvider was judged"):
        Served(models, tmp_path / "refused.json").start()
    monkeypatch.setenv("DFMCL_TRITON_PYTHON", str(TRITON))
    served = Served(models, tmp_path / "ready.json").start()
    try:
        probes = read_probes(out / "probes.npz")
        with Client(served.ready["grpc"], "digits") as client:
            answer = client.predict(probes["adversarial"][:16]).logits
    finally:
        assert served.close() == 0
    recorded = probes["adversarial_logits"][:16]
    assert np.abs(answer - recorded).max() <= ROUNDS * np.abs(recorded).max()

    version = models / "digits" / "1"
    done = with_openvino("parity", version)
    first, *others = done.stdout.splitlines()
    assert (done.returncode, first.split(":")[0]) == (
        0, f"equal  OpenVINOExecutionProvider, {'float32' if precision == 'fp32' else 'bfloat16'} (decided)"
    )  # fmt: skip
    kept = [line.split()[0] for line in others if line.split()[1] == "CPUExecutionProvider,"]
    assert kept == (["equal", "equal"] if precision == "fp32" else ["DIFFERS", "DIFFERS"])
    assert code_of("parity", str(version)) == 1, "here nobody can compute as was judged"
