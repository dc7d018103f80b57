"""The newcomer's line: a verdict without a policy file, by a policy that is written down."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from dfmcl.cli.command import app
from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.common.progress import silent
from dfmcl.common.text import why_not_local
from dfmcl.gating.assumed import Assumed
from dfmcl.gating.case import prepare
from dfmcl.gating.gate import TRAINING, gate
from dfmcl.gating.policy import Policy, load_policy
from dfmcl.gating.signing.evidence import read_evidence
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.folder import read_image
from dfmcl.robustness.runs import load_run
from tests.gating.test_subject import Tiny, to_onnx

IMAGES = 60
SQUARE = InputContract.parse("float32 NCHW 16x16x3")


def dfmcl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, names: str) -> Path:
    """CLASS/NUMBER.png of uint8 images (N, H, W, 3), where `names[label]` is the class."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders and nothing else, as an engineer keeps them: the first digits of the test part."""
    digits = load_dataset("digits")
    return write_folder(tmp_path / "photos", digits.x_test[:IMAGES], digits.y_test[:IMAGES], "0123456789")


def test_one_line_leads_to_a_verdict(
    standard_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary file, its mean and std outside, and a folder: the refusal's words repair the call, which then judges
    the model; the policy that it wrote is the one that it used, and another gate can take it."""
    network = load_run(standard_run).model
    to_onnx(tmp_path / "model.onnx", network.net.eval(), torch.zeros(2, 3, 16, 16))
    monkeypatch.chdir(tmp_path)
    line = ["gate", "model.onnx", "--data", "photos", "--eps", "24/255", "--at-least", "0.3"]
    refused = dfmcl(*line)
    assert refused.exit_code == 2, refused.output
    assert "the model takes float32 NCHW 16x16x3 plain, from 0 to 1 (else say --input)" in refused.output
    words = re.search(r"declare it: --input '([^']+)'", refused.output)
    assert words is not None, refused.output
    judged = dfmcl(*line, "--input", words[1])
    assert judged.exit_code == 1, judged.output
    assert "assumed: robust_accuracy >= 0.3 at 95 % in Linf 24/255, suite fast, checks on 32" in judged.output
    assert f"all test images of photos, brought to 16x16 by fit bilinear; the model takes {words[1]}" in judged.output
    report, _ = read_evidence(tmp_path / "evidence")
    written = load_policy(tmp_path / "evidence" / "policy.toml")
    assert written.digest == report.policy.sha256
    assert (report.data.images, report.candidate.kind) == (IMAGES, "onnx")
    assert InputContract.from_json(report.candidate.input.to_json()) == InputContract.parse(words[1])


@pytest.mark.parametrize(
    ("eps", "threat", "criteria", "ball", "said"),
    [
        (None, "patch:3x3", ["robust_accuracy(patch:3x3) >= 0.3 at 95 %"], "linf 4/255", ", checks in Linf 4/255"),
        (None, "l2:0.5", ["robust_accuracy >= 0.3 at 95 %"], "l2 0.5", " in L2 0.5"),
        (None, "8/255", ["robust_accuracy >= 0.3 at 95 %"], "linf 8/255", " in Linf 8/255"),
        (None, "l1:6", ["robust_accuracy(l1:6) >= 0.3 at 95 %"], "linf 4/255", ", checks in Linf 4/255"),
        (
            "1/255",
            "fog@3|rotation:15",
            [
                "robust_accuracy >= 0.3 at 95 %",
                "robust_accuracy(fog@3|rotation:15,31x1x1,bilinear,black) >= 0.3 at 95 %",
            ],
            "linf 1/255",
            " in Linf 1/255",
        ),
        (
            "2/255",
            "l2:0.5",
            ["robust_accuracy >= 0.3 at 95 %", "robust_accuracy(l2:0.5) >= 0.3 at 95 %"],
            "linf 2/255",
            " in Linf 2/255",
        ),
    ],
)
def test_a_threat_takes_the_radiuss_place_or_stands_beside_it(
    eps: str | None, threat: str, criteria: list[str], ball: str, said: str
) -> None:
    """A ball of Linf or L2 is the policy's own; of another threat the criterion says which."""
    contract = InputContract.parse("uint8 NHWC 16x16x3")
    asked = Assumed.of("digits", eps, threat, "0.3")
    policy = asked.policy(contract)
    assert (policy.criteria, f"{policy.threat.norm} {policy.threat.eps}") == (criteria, ball)
    line = asked.said(policy, contract, Path("policy.toml"))[0]
    assert line == f"assumed: {' and '.join(criteria)}{said}, suite fast, checks on 32 images; see policy.toml"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXTS.filter(lambda text: not why_not_local(text)), st.integers(0, 9), st.lists(st.just("pgd-5"), max_size=1))
def test_a_written_policy_is_the_same_policy(
    tmp_path_factory: pytest.TempPathFactory, path: str, images: int, suite: list[str]
) -> None:
    """Whatever its strings hold, its digest is what the file's is."""
    text = {
        "criteria": ["robust_accuracy >= 0.3 at 95 %", "clean_accuracy >= 0.5 at 99 %"],
        "threat": {"eps": "4/255"},
        "data": {"name": "folder", "path": path, "images": images},
        "attacks": {"suite": suite or "fast"},
    }
    policy = Policy.of_text(text)
    file = tmp_path_factory.getbasetemp() / "policy.toml"
    file.write_text(policy.to_toml(), encoding="utf-8")
    assert load_policy(file).digest == policy.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            "without a policy it needs --data FOLDER --eps 4/255 --at-least 0.3, and lacks --data, --eps, --at-least",
        ),
        (["--data", "digits", "--eps", "4/255"], "and lacks --at-least"),
        (["--data", "digits", "--eps", "4", "--at-least", "0.3"], "--eps 4: a radius is above 0"),
        (["--data", "digits", "--eps", "4/255", "--at-least", "30"], "--at-least 30: expected a share of the images"),
        (["--data", "digits", "--eps", "4/255", "--at-least", "0 %"], "--at-least 0 %: every model has that"),
        (
            ["--data", "mnist", "--eps", "4/255", "--at-least", "0.3"],
            "--data mnist: is not there; name a folder, an .npz",
        ),
        (["--data", "s3://a/b", "--eps", "4/255", "--at-least", "0.3"], "--data s3://a/b: s3: is no folder here"),
        (["--policy", "p.toml", "--eps", "4/255"], "--policy p.toml says data, threat and threshold; leave --eps out"),
        (
            ["--policy", "p.toml", "--threat", "fog"],
            "--policy p.toml says data, threat and threshold; leave --threat out",
        ),
        (["--data", "digits", "--threat", "fogg", "--at-least", "0.3"], "--threat fogg: threat 'fogg' is unknown"),
        (
            ["--data", "digits", "--threat", "l2:0.001", "--at-least", "0.3"],
            "--threat l2:0.001: 0.001 is below one step",
        ),
    ],
)
def test_half_a_line_says_which_half_is_missing(options: list[str], message: str) -> None:
    """One line, before anything is loaded; a policy and its parts exclude each other."""
    result = dfmcl("gate", "model.onnx", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_data_of_any_kind_are_named_as_a_policy_names_them(photos: Path, tmp_path: Path) -> None:
    """A folder is fitted to the model's square, an archive and a known name are as they are."""
    np.savez(tmp_path / "a.npz", x_test=np.zeros((2, 16, 16, 3), np.uint8), y_test=[0, 1])
    (tmp_path / "a.csv").write_text("path,label\n")
    (tmp_path / "shards" / "test").mkdir(parents=True)
    (tmp_path / "shards" / "test" / "0.tar").touch()
    (tmp_path / "tables" / "data").mkdir(parents=True)
    (tmp_path / "tables" / "data" / "test-0.parquet").touch()
    for data, section in (
        (str(photos), ("folder", str(photos), 16)),
        (str(tmp_path / "a.npz"), ("npz", str(tmp_path / "a.npz"), 0)),
        ("digits", ("digits", "", 0)),
        (str(tmp_path / "a.csv"), ("csv", str(tmp_path / "a.csv"), 16)),
        (str(tmp_path / "shards"), ("shards", str(tmp_path / "shards"), 16)),
        (str(tmp_path / "tables"), ("parquet", str(tmp_path / "tables"), 16)),
    ):
        found = Assumed.of(data, "4/255", None, "30 %").policy(SQUARE)
        assert (found.data.name, found.data.path, found.data.image_size) == section
        assert found.criteria == ["robust_accuracy >= 0.3 at 95 %"]
    with pytest.raises(
        BadInput, match=r"fitted to a square, the model takes float32 NCHW 16x12x3; save them as an \.npz"
    ):
        Assumed.of(str(photos), "4/255", None, "0.3").policy(InputContract.parse("float32 NCHW 16x12x3"))


def test_a_folder_of_some_of_the_models_classes_is_labelled_by_name(tmp_path: Path) -> None:
    """Three classes of five, in another order than the model's: labels are places among the model's, grey is grey."""
    stream = np.random.default_rng(0)
    images = stream.integers(0, 256, (6, 16, 16, 3), np.uint8)
    folder = write_folder(tmp_path / "photos", images, np.arange(6) % 3, "ead")
    policy = Assumed.of(str(folder), "4/255", None, "0.3").policy(SQUARE)
    for channels in (3, 1):
        path = to_onnx(tmp_path / f"{channels}.onnx", Tiny(channels), torch.zeros(2, channels, 16, 16))
        subject = onnx_subject(path, "", tuple("abcde"))
        data = prepare(subject, policy, {}, None, (), silent).data
        assert data.classes == tuple("abcde")
        assert data.y_test.tolist() == [0, 0, 3, 3, 4, 4]
        assert (len(data.x_train), data.x_test.shape[1:]) == (0, (16, 16, channels))
        luminance = np.asarray(Image.fromarray(images[1]).convert("L"))
        expected = images[1] if channels == 3 else luminance[..., None]
        np.testing.assert_array_equal(data.x_test[:1][0], expected)
    with pytest.raises(BadInput, match="has 3 classes, the model 5; name the model's with --labels"):
        prepare(onnx_subject(path), policy, {}, None, (), silent)


def test_a_candidate_is_judged_on_what_it_will_be_shown(photos: Path, tmp_path: Path) -> None:
    """Its preprocessing travels with it; a policy with another is refused, and both are named."""
    path = to_onnx(tmp_path / "model.onnx", Tiny(), torch.zeros(2, 3, 16, 16))
    (tmp_path / "labels.txt").write_text("\n".join("abcde"))
    folder = write_folder(tmp_path / "own", np.zeros((5, 20, 30, 3), np.uint8), np.arange(5), "abcde")
    told = ["--preprocessing", "resize=20 bicubic"]
    made = dfmcl("export", path, "--input", "float32 NCHW", "--labels", tmp_path / "labels.txt", "--out",
                 tmp_path / "candidate", *told)  # fmt: skip
    assert made.exit_code == 0, made.output
    line = ["gate", tmp_path / "candidate", "--data", folder, "--eps", "4/255", "--at-least", "0.3"]
    refused = dfmcl(*line, "--out", tmp_path / "evidence")
    assert refused.exit_code == 2
    assert "preprocessed by fit bilinear" in refused.output
    assert "is served with resize=20 bicubic; judge it on what it will be shown" in refused.output
    for wrong in ("resize=12", "crop"):
        assert dfmcl(*line, "--preprocessing", wrong).exit_code == 2
    rules = Assumed.of(str(folder), "4/255", None, "0.3", Preprocessing.parse(told[1])).policy(SQUARE)
    case = prepare(candidate_subject(tmp_path / "candidate"), rules, {}, None, (), silent)
    assert case.data.preprocessing == "resize=20 bicubic"


def test_a_gate_of_few_images_reads_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 test images those that it asks about before the attacks, of 800 training images those that checks and
    substitute ask about; all others are never decoded, as their digests suffice."""
    stream = np.random.default_rng(0)
    images = stream.integers(0, 256, (1000, 16, 16, 3), np.uint8)
    write_folder(tmp_path / "photos" / "test", images[:200], np.arange(200) % 5, "abcde")
    write_folder(tmp_path / "photos" / "train", images[199:999], np.arange(800) % 5, "abcde")
    path = to_onnx(tmp_path / "model.onnx", Tiny(), torch.zeros(2, 3, 16, 16))
    asked = Assumed.of(str(tmp_path / "photos"), "64/255", None, "1").policy(SQUARE).model_dump()
    asked["data"]["images"], asked["attacks"]["suite"], asked["attacks"]["substitute"] = 10, ["fgsm"], 100
    decoded = set[str]()

    def counted(path: str, *how: Any) -> np.ndarray:
        decoded.add(path)
        return read_image(path, *how)

    monkeypatch.setattr("dfmcl.robustness.image_set.read_image", counted)
    report = gate(onnx_subject(path), Policy.of_text(asked), tmp_path / "evidence")
    test = {name for name in decoded if "/test/" in name}
    assert (report.statistics.attacked, len(test)) == (10, 128)
    assert len(decoded - test) <= TRAINING + 100 < 800
    assert report.data.sha256 == load_dataset("folder", str(tmp_path / "photos"), 16).sha256


def test_the_page_says_what_the_command_takes() -> None:
    """Every command of docs/own-model.md parses as it stands there, and the example's scale is one."""
    page = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [words for words in lines if words[0] == "dfmcl"]
    assert len(commands) == 5
    group: Any = typer.main.get_command(app)
    for _, name, *words in commands:
        given = group.commands[name].make_context(name, words).params["contract"]
        assert given is None or str(InputContract.parse(given, (None, 3, 224, 224), "float32")).endswith(given)
