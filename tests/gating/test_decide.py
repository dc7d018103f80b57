"""Whose answers count: the provider that a policy names decides, or nothing is decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import PROVIDERS, Decider, deciders
from dfmcl.common.toml import read_toml, validated
from dfmcl.gating.decide import DecideSection, require_decider
from dfmcl.gating.formats.markdown import markdown
from dfmcl.gating.policy import Policy
from dfmcl.gating.signing.attestation import NotAttested, read_attestation, verify
from dfmcl.gating.signing.report import DecidedEntry, Report
from dfmcl.gating.signing.trust import load_trust
from dfmcl.gating.subject import decided_by
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.robustness import onnx_graph
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.onnx_graph import read_graph, require_precision
from dfmcl.robustness.provider import CPU, Provider, left_elsewhere
from tests.exports import Export
from tests.gating.test_subject import Tiny, Wired, zeros
from tests.gating.test_subject import to_onnx as written
from tests.signing import code_of, make_key, policy_of, report_on, trusting, write_report, write_trust

CONTRACT = InputContract.parse("uint8 NHWC 8x8x3")
OPENVINO = {"provider": "openvino", "precision": "bf16", "tf32": False}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "model.onnx", Wired(Tiny(), CONTRACT), zeros(CONTRACT))


@pytest.fixture(scope="module")
def candidate(standard_run: Path, export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_once(standard_run, tmp_path_factory.mktemp("decide") / "candidate")


def test_a_policy_that_names_nobody_keeps_its_digest() -> None:
    """Trust files know policies by digests; one that names another decider is another policy, and reads back."""
    plain, spelled = policy_of(), policy_of(decide={"provider": "cpu"})
    assert "decide" not in plain.as_written()
    assert plain.digest == spelled.digest
    named = policy_of(decide=OPENVINO)
    assert named.digest != plain.digest
    assert named.decide.decider == Decider("openvino", "bf16")


def test_a_policy_with_a_decider_is_written_as_it_is_read(tmp_path: Path) -> None:
    """policy.toml of the evidence has the section, and the same digest."""
    named = policy_of(decide={"provider": "tensorrt", "precision": "fp16", "tf32": True})
    (tmp_path / "policy.toml").write_text(named.to_toml())
    again = validated(Policy, read_toml(tmp_path / "policy.toml", ""), "policy.toml")
    assert (again, again.digest) == (named, named.digest)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"provider": "gpu"}, "provider: 'gpu' is none of cpu, cuda, tensorrt, openvino"),
        ({"provider": "openvino", "precision": "fp16"}, "precision: openvino has fp32, bf16, int8, and no 'fp16'"),
        ({"precision": "bf16"}, "precision: cpu has fp32, int8, and no 'bf16'"),
        ({"provider": "openvino", "tf32": True}, "tf32: openvino has none; leave it out"),
    ],
)
def test_a_decider_that_there_is_not_is_refused(section: dict[str, Any], said: str) -> None:
    """By the key and what there is."""
    with pytest.raises(BadInput, match=rf"^gate\.toml: decide: {said}"):
        validated(DecideOnly, {"decide": section}, "gate.toml")


class DecideOnly(Policy):
    """A policy; only its [decide] matters."""

    criteria: list[str] = ["robust_accuracy >= 0.5 at 95 %"]  # noqa: RUF012 - pydantic copies defaults
    threat: Any = None
    data: Any = None
    attacks: Any = None


def test_what_is_not_installed_ends_with_2_and_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the provider, what is there, and the package; nothing is written."""
    absent = next(
        name for name in ("openvino", "cuda") if PROVIDERS[name].onnxruntime not in ort.get_available_providers()
    )
    policy = tmp_path / "gate.toml"
    policy.write_text(policy_of(decide={"provider": absent}).to_toml())
    out = tmp_path / "evidence"
    assert code_of("gate", str(file), "--policy", str(policy), "--input", str(CONTRACT), "--out", str(out)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert f"decide.provider {absent} ({PROVIDERS[absent].onnxruntime}): ONNX Runtime {ort.__version__} fell" in line
    assert f"install {PROVIDERS[absent].package} in its place" in line
    assert not out.exists()


def test_only_what_onnx_runtime_computes_has_a_provider(tmp_path: Path) -> None:
    """A module answers in torch, whichever provider a policy names."""
    with pytest.raises(BadInput, match=r"torch\.nn:Identity: is of kind module, which .* does not compute"):
        open_subject("torch.nn:Identity", contract=str(CONTRACT), provider=Provider.of(Decider("cuda")))


def test_a_subject_is_judged_by_the_decider_of_its_policy_only(file: Path) -> None:
    """Opened for the CPU and judged by a policy that names OpenVINO, the CPU's answers would count."""
    subject = onnx_subject(file, str(CONTRACT))
    require_decider(subject, DecideSection())
    with pytest.raises(BadInput, match="is computed by cpu, fp32, and the policy names openvino, bf16"):
        require_decider(subject, DecideSection.model_validate(OPENVINO))
    with pytest.raises(BadInput, match="is computed by AzureExecutionProvider"):
        require_decider(replace(subject, provider=Provider("AzureExecutionProvider")), DecideSection())


class Session:
    """ONNX Runtime's session where its hardware is missing: its providers as asked, and as it names them."""

    asked: list[Any]
    first = ""

    def __init__(self, model: bytes, options: ort.SessionOptions, providers: list[Any]) -> None:
        type(self).asked = providers

    def get_providers(self) -> list[str]:
        return [self.first, "CPUExecutionProvider"]


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[Session]]:
    """An ONNX Runtime that lists every provider, and whose sessions begin with the one that is named."""

    def pretend(first: str) -> type[Session]:
        class Fake(Session):
            pass

        Fake.first = first
        monkeypatch.setattr(ort, "get_available_providers", lambda: [kind.onnxruntime for kind in PROVIDERS.values()])
        monkeypatch.setattr(ort, "InferenceSession", Fake)
        return Fake

    return pretend


@pytest.mark.parametrize("decider", [one for name in ("cuda", "tensorrt") for one in deciders(name)], ids=str)
def test_a_gpu_that_is_not_there_is_no_decider(
    decider: Decider, pretending: Callable[[str], type[Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are listed without a GPU, too, and ONNX Runtime then takes the CPU; they were asked as documented."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    fake = pretending("CPUExecutionProvider")
    with pytest.raises(BadInput, match=rf"decide\.provider {decider.provider} .* fell back to another provider"):
        Provider.of(decider).session(b"")
    tf32 = ("CUDAExecutionProvider", {"use_tf32": str(int(decider.tf32))})
    options = {"bf16": {"trt_bf16_enable": "1"}, "fp16": {"trt_fp16_enable": "1"}, "int8": {"trt_int8_enable": "1"}}
    first = ("TensorrtExecutionProvider", options.get(decider.precision, {}))
    assert fake.asked == ([tf32] if decider.provider == "cuda" else [first, tf32])


def test_tensorrt_rounds_to_tf32_unless_its_variable_says_no(
    pretending: Callable[[str], type[Session]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no option, so that the variable is asked for before anything is decided; tf32 = true needs none."""
    pretending("CPUExecutionProvider")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(BadInput, match="rounds to TF32 unless NVIDIA_TF32_OVERRIDE=0 is set"):
        Provider.of(Decider("tensorrt")).session(b"")
    with pytest.raises(BadInput, match="fell back"):
        Provider.of(Decider("tensorrt", tf32=True)).session(b"")


def test_nodes_that_are_left_to_another_provider_are_named() -> None:
    """But for shapes and places, which every provider leaves to the CPU; what gives pixels or logits counts."""
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"

    def node(provider: str, name: str, kind: str) -> dict[str, Any]:
        given = [{kind: [1]}]
        return {"cat": "Node", "args": {"provider": provider, "op_name": name, "output_type_shape": given}}

    events = [
        node(cpu, "Shape", "int64"), node(cpu, "Gather", "int64"), node(cuda, "Conv", "float"),
        node(cpu, "Relu", "float"), node(cpu, "QuantizeLinear", "uint8"), {"cat": "Session", "args": {}},
    ]  # fmt: skip
    assert left_elsewhere(events, {cuda}) == ["QuantizeLinear", "Relu"]
    assert left_elsewhere(events, {cuda, cpu}) == []


def test_whole_numbers_are_in_the_file_or_nowhere(file: Path) -> None:
    """int8 of a float file would be float32 by another name, and float32 of a quantised one int8."""
    with pytest.raises(BadInput, match=r"decide\.precision is int8, and the file is not quantised"):
        onnx_subject(file, str(CONTRACT), provider=Provider.of(Decider("cpu", "int8")))
    graph = read_graph(file, str(CONTRACT))
    graph.model.graph.node[0].op_type = "QuantizeLinear"
    with pytest.raises(BadInput, match=r"is quantised, and decide\.precision is fp32; say int8"):
        require_precision(graph, Provider.of(Decider("openvino")), None, np.zeros(1))


def test_a_precision_that_changes_no_bit_is_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO computes in float32 without a word where a processor has no bfloat16: then the answers are equal."""
    graph = read_graph(file, str(CONTRACT))
    example = np.zeros((2, 8, 8, 3), np.uint8)
    plain = CPU.session(graph.model.SerializeToString())
    monkeypatch.setattr(onnx_graph, "opened", lambda *arguments, **options: plain)
    with pytest.raises(BadInput, match=r"decide\.precision is bf16, and openvino computes in fp32"):
        require_precision(graph, Provider.of(Decider("openvino", "bf16")), plain, example)


def entry(**changes: Any) -> DecidedEntry:
    return DecidedEntry(**{**OPENVINO, "runtime": "onnxruntime-openvino 1.24.1", "library": "2025.4.1", **changes})


def signed(tmp_path: Path, candidate: Path, decided: DecidedEntry | None, **policy: Any) -> tuple[Path, Path]:
    """Evidence that says who decided, signed as it is, by a policy with these keys; and the key."""
    key, evidence = make_key(tmp_path), tmp_path / "evidence"
    evidence.mkdir()
    report = replace(report_on(candidate, evidence, policy=policy_of(**policy)), decided=decided)
    return write_report(evidence, report, key), key


def test_report_and_attestation_say_who_decided(tmp_path: Path, candidate: Path) -> None:
    """And they read back; an earlier report, which says nothing of it, is one of the CPU."""
    evidence, key = signed(tmp_path, candidate, entry(), decide=OPENVINO)
    report = verify(candidate, evidence, trusting(key))
    assert str(report.decided) == "openvino, bf16 (onnxruntime-openvino 1.24.1, 2025.4.1)"
    assert Report.from_json(report.to_json()) == report
    assert "openvino, bf16 (onnxruntime-openvino 1.24.1, 2025.4.1)" in markdown(report)
    said = read_attestation(evidence, trusting(key)).robustness["decided"]
    assert said == {**OPENVINO, "runtime": "onnxruntime-openvino 1.24.1", "library": "2025.4.1"}


@pytest.mark.parametrize(
    ("decided", "policy"),
    [(entry(), {}), (None, {"decide": OPENVINO}), (entry(precision="fp32"), {"decide": OPENVINO})],
    ids=["named by no policy", "not said", "in another precision"],
)
def test_who_decided_is_whom_the_policy_names(
    tmp_path: Path, candidate: Path, decided: DecidedEntry | None, policy: dict[str, Any]
) -> None:
    """A signed report that contradicts its policy is not believed."""
    evidence, key = signed(tmp_path, candidate, decided, **policy)
    with pytest.raises(NotAttested, match=r"decided is '.*', and '.*' follows from its own record"):
        verify(candidate, evidence, trusting(key))


def test_a_trust_file_may_say_who_decides(tmp_path: Path, candidate: Path) -> None:
    """What another provider decided is refused; a name that is no provider's is an error in the file."""
    evidence, key = signed(tmp_path, candidate, entry(), decide=OPENVINO)
    path = write_trust(key)
    text = path.read_text()
    for names, error in (('["openvino", "cpu"]', None), ('["cpu"]', NotAttested), ('["gpu"]', BadInput)):
        path.write_text(f"{text}providers = {names}\n")
        if error is None:
            verify(candidate, evidence, load_trust(path))
            continue
        with pytest.raises(error, match=r"'openvino' decided, which the trust file does not list|providers"):
            verify(candidate, evidence, load_trust(path))


def test_the_cpu_says_so_with_its_version(file: Path) -> None:
    """In every report of a file that ONNX Runtime computes."""
    decided = decided_by(onnx_subject(file, str(CONTRACT)).provider)
    assert decided is not None
    assert (decided.provider, decided.precision, decided.library) == ("cpu", "fp32", None)
    assert decided.runtime.endswith(f" {ort.__version__}")
    assert decided_by(None) is None
