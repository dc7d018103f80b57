"""The generated config.pbtxt, read by Triton's own protobuf."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dfmcl.common.batch import most_asked
from dfmcl.common.errors import BadInput, Refused, Rejected
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.common.providers import PROVIDERS, Decider, deciders
from dfmcl.release.candidate import Manifest, read_manifest
from dfmcl.release.layout import checked_name, configs, decider_at, parse_config, require_ours
from dfmcl.release.stores.directory import Directory
from dfmcl.serving.clients.triton import Contract


def test_config_says_what_triton_needs(candidate: Path) -> None:
    """Triton's protobuf reads the config as one version on one CPU instance, with no delay and no cache."""
    manifest = read_manifest(candidate)
    config = parse_config(configs(manifest, "digits", 7, threads=3)["config.pbtxt"], "config.pbtxt")
    assert (config.name, config.backend, config.default_model_filename) == ("digits", "onnxruntime", "model.onnx")
    assert list(config.input[0].dims) == [16, 16, 3]
    assert (
        config.input[0].data_type
        == config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name["TYPE_UINT8"].number
    )
    assert list(config.output[0].dims) == [10]
    assert config.output[0].label_filename == "7/labels.txt"
    assert list(config.version_policy.specific.versions) == [7]
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, config.instance_group[0].KIND_CPU)]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.ListFields(), "a delay, levels or a policy make requests wait for half a second"
    assert not config.response_cache.enable
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, config.max_batch_size]
    assert dict(config.metric_tags) == {"sha": manifest.model_sha256[:12]}
    told = replace(manifest, preprocessing=Preprocessing.parse("resize=20 bicubic"))
    assert Manifest.from_json(told.to_json()) == told
    other = parse_config(configs(told, "digits", 7)["config.pbtxt"], "config.pbtxt")
    asked = [Contract.of(one, "digits").preprocessing for one in (config, other)]
    assert asked == [manifest.preprocessing, told.preprocessing]
    other.parameters["preprocessing"].string_value = "crop"
    with pytest.raises(Rejected, match="digits: its configuration's parameter preprocessing: 'crop' is no"):
        Contract.of(other, "digits")


@pytest.mark.parametrize("name", ["", ".hidden", "-flag", "a/b", "..", "a b", 'a"b', "1st", "ä", "x" * 65])
def test_unsafe_name_is_bad_input(name: str) -> None:
    """A name that could leave its directory or break a config is refused."""
    with pytest.raises(BadInput, match="model name"):
        checked_name(name)


@pytest.mark.parametrize("kind", ["config.pbtxt", "configs/gpu.pbtxt"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('backend: "onnxruntime"', 'backend: "python"'),
        ('"model.onnx"', '"other.onnx"'),
        ('"1/labels.txt"', '".staging-x/labels.txt"'),
        ("enable: false", "enable: true"),
        ("dynamic_batching { }", "dynamic_batching { priority_levels: 2 default_priority_level: 1 }"),
        ('name: "digits"', 'name: "digits"\nruntime: "model.py"'),
        ('name: "digits"', 'name: "digits"\nmodel_operations { op_library_filename: "evil.so" }'),
        ('name: "digits"', 'name: "digits"\ncc_model_filenames { key: "9.0" value: "../.staging-x/evil.onnx" }'),
        ('name: "digits"', 'name: "digits"\nparameters { key: "EXECUTION_ENV_PATH" value { string_value: "/evil" } }'),
    ],
)
def test_config_that_promotion_did_not_write_is_refused(
    candidate: Path, tmp_path: Path, kind: str, old: str, new: str
) -> None:
    """A config that was edited to run, to load or to answer otherwise is not served; as it was written it is."""
    manifest = read_manifest(candidate)
    text, path = configs(manifest, "digits", 1, threads=3)[kind], tmp_path / "digits" / kind
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (tmp_path / "digits" / "1").mkdir()
    (tmp_path / "digits" / "1" / "report.json").write_text("{}")
    require_ours(Directory(tmp_path), "digits", kind, manifest, 1)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(Refused, match="is not what promotion writes for version 1"):
        require_ours(Directory(tmp_path), "digits", kind, manifest, 1)


@pytest.mark.parametrize(("side", "most"), [(16, 64), (32, 64), (224, 13), (2000, 1)])
def test_no_batch_is_served_that_the_checks_do_not_ask(candidate: Path, side: int, most: int) -> None:
    """A model that answers otherwise in company must have been seen in it; large images cost memory."""
    manifest = replace(read_manifest(candidate), input_shape=(side, side, 3))
    config = parse_config(configs(manifest, "digits", 7)["config.pbtxt"], "config.pbtxt")
    assert config.max_batch_size == most <= most_asked(side * side * 3)
    assert {warmup.batch_size for warmup in config.model_warmup} == {1, most}


def test_the_config_for_gpus_differs_in_its_instances_only(candidate: Path) -> None:
    """Two instances, CUDA and TensorRT in FP32."""
    texts = configs(read_manifest(candidate), "digits", 7)
    assert list(texts) == ["configs/gpu.pbtxt", "config.pbtxt"], "the commit comes last"
    cpu, gpu = (parse_config(texts[name], name) for name in ("config.pbtxt", "configs/gpu.pbtxt"))
    assert [(group.count, group.kind) for group in gpu.instance_group] == [(2, gpu.instance_group[0].KIND_GPU)]
    accelerators = gpu.optimization.execution_accelerators.gpu_execution_accelerator
    assert [entry.name for entry in accelerators] == ["tensorrt", "cuda"]
    assert accelerators[0].parameters["precision_mode"] == "FP32"
    for config in (cpu, gpu):
        config.ClearField("instance_group")
        config.ClearField("optimization")
    assert cpu == gpu


@pytest.mark.parametrize("decider", [one for name in PROVIDERS for one in deciders(name)], ids=str)
def test_what_decided_is_what_serves(candidate: Path, decider: Decider) -> None:
    """NVIDIA's backend by its accelerator, ours by the very options that the gate asked with; both configs the same."""
    texts = configs(read_manifest(candidate), "digits", 7, threads=3, decider=decider)
    if decider.provider == "cpu":
        assert texts == configs(read_manifest(candidate), "digits", 7, threads=3)
        return
    assert texts["config.pbtxt"] == texts["configs/gpu.pbtxt"]
    config = parse_config(texts["config.pbtxt"], "config.pbtxt")
    asked = json.loads(config.parameters["execution_providers"].string_value)
    assert [tuple(one) for one in asked] == decider.asked(3)
    found = config.optimization.execution_accelerators
    group = config.instance_group[0]
    if decider.kind.gpu:
        assert group.kind == group.KIND_GPU
        assert found.gpu_execution_accelerator[-1].parameters["use_tf32"] == str(int(decider.tf32))
        names = [one.name for one in found.gpu_execution_accelerator]
        assert names == (["cuda"] if decider.provider == "cuda" else ["tensorrt", "cuda"])
        if decider.provider == "tensorrt":
            assert found.gpu_execution_accelerator[0].parameters["precision_mode"] == decider.precision.upper()
        return
    assert group.kind == group.KIND_CPU
    # Of OpenVINO, NVIDIA's backend knows no precision: it must not find an accelerator that it would run in float32.
    [accelerator] = found.cpu_execution_accelerator
    assert accelerator.name == ("openvino-bf16" if decider.precision == "bf16" else "openvino")
    assert '"f32"' in str(asked) or decider.precision == "bf16"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("{", "not readable"),
        ('{"decided": 3}', "decided names no provider"),
        ('{"decided": {"provider": "openvino", "precision": "fp16", "tf32": false}}', "decided names no provider"),
        ('{"decided": {"provider": [], "precision": "fp32", "tf32": false}}', "decided names no provider"),
        ('{"decided": {"provider": "cuda", "precision": "fp32", "tf32": "0"}}', "decided names no provider"),
    ],
)
def test_a_report_that_names_nobody_is_bad_input(tmp_path: Path, report: str, said: str) -> None:
    """Whoever wrote it: nothing is served by a guess."""
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(BadInput, match=said):
        decider_at(Directory(tmp_path.parent), tmp_path.name)
