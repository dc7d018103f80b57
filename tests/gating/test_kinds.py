"""Every kind of model in PyTorch: opened, judged as it answers, and refused in one line where it is no such thing."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.case import require_kind
from dfmcl.gating.kinds import KINDS
from dfmcl.gating.policy import Policy
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.registry import OPENED, file_kind, kind_of, open_subject
from dfmcl.robustness.models import to_bytes
from dfmcl.robustness.onnx_graph import noise
from tests.gating.test_subject import Tiny, assert_is, assert_same, to_onnx

INPUT = "float32 NCHW 8x8x3"
LABELS = tuple("abcde")
NETWORK = "dfmcl_network_of_a_user"
CODE = """
from torch import nn

def make(classes=5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, classes))
"""


def small(classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, classes)).eval()


def script(path: Path, net: nn.Module, example: Tensor | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        made = torch.jit.trace(net, example) if example is not None else torch.jit.script(net)
        made.save(str(path))
    return path


def program(path: Path, net: nn.Module, images: int = 2, *, free: bool = False, **bounds: int) -> Path:
    shapes = ({0: torch.export.Dim("batch", **bounds)},) if free else None
    torch.export.save(torch.export.export(net, (torch.zeros(images, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


def weights(path: Path, state: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / f"{NETWORK}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield f"{NETWORK}:make"
    sys.modules.pop(NETWORK, None)


def assert_answers_again(subject: Subject) -> None:
    """What was opened anew, from the disk or in another process, answers as the subject does."""
    x = noise(subject.contract, 9)
    assert subject.afresh is not None
    assert_same(torch.from_numpy(subject.afresh(to_bytes(x).numpy())), subject.decide(x))


def test_the_registry_is_whole() -> None:
    """Each kind can be opened, and stands in the default of a policy."""
    assert list(KINDS) == list(OPENED) == Policy.model_fields["subjects"].get_default(call_default_factory=True)


def test_a_torchscript_file_is_its_network(tmp_path: Path) -> None:
    """Traced or scripted: its answers, its gradients, its digest and its state; its suffix is no matter."""
    for name, example in (("model.ts", torch.zeros(2, 3, 8, 8)), ("model.bin", None)):
        path = script(tmp_path / name, small(), example)
        subject = open_subject(str(path), contract=INPUT, labels=LABELS)
        assert (subject.kind, subject.classes) == ("torchscript", LABELS)
        assert_is(subject, small())
        assert subject.state is not None
        assert subject.state() == subject.state()
    assert_answers_again(subject)


class Counts(nn.Module):
    """Answers otherwise from its third call on, by a number that Python does not see in a script."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = small(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        answer: Tensor = self.net(x)
        return answer if self.calls < 10_000 else -answer


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "written-by-a-model")
        return x.flatten(1)


def test_a_script_that_counts_or_writes_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps is seen from outside; one that could write files is not even loaded."""
    monkeypatch.chdir(tmp_path)
    subject = open_subject(str(script(tmp_path / "counts.pt", Counts())), contract=INPUT)
    assert subject.state is not None
    before = subject.state()
    subject.decide(noise(subject.contract, 1))
    assert subject.state() != before
    with pytest.raises(BadInput, match=r"writes\.pt: its code says 'save', which can open files"):
        open_subject(str(script(tmp_path / "writes.pt", Writes())), contract=INPUT)
    assert not (tmp_path / "written-by-a-model").exists()


@pytest.mark.parametrize(
    ("images", "options"),
    [(2, {"free": True}), (3, {}), (4, {"free": True, "min": 3, "max": 5})],
    ids=["any batch", "batches of 3", "batches of 3 to 5"],
)
def test_a_program_is_its_network_in_batches_of_any_size(tmp_path: Path, images: int, options: dict[str, Any]) -> None:
    """Filled up or cut where it was exported for some sizes only."""
    path = program(tmp_path / "model.pt2", small(), images, **options)
    subject = open_subject(str(path), contract=INPUT)
    assert (subject.kind, subject.classes) == ("program", 5)
    assert_is(subject, small(), images=7)
    assert_answers_again(subject)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_of_the_network_that_is_named(tmp_path: Path, suffix: str) -> None:
    """As many classes as the weights have; in torchvision's network no code of others runs."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()
    path = weights(tmp_path / f"model{suffix}", net.state_dict())
    arch = "torchvision:shufflenet_v2_x0_5"
    subject = open_subject(str(path), contract="float32 NCHW 32x32x3 imagenet", arch=arch)
    assert (subject.kind, subject.classes) == ("weights", 7)
    assert not KINDS[subject.kind].code
    x = noise(subject.contract, 3)
    assert_same(subject.decide(x), net(subject.contract.scale.applied(x)).detach())
    with pytest.raises(BadInput, match="has 7 classes, there are 5 labels"):
        open_subject(str(path), contract="float32 NCHW 32x32x3", arch=arch, labels=LABELS)
    if suffix == ".pth":
        assert_answers_again(subject)


def test_weights_in_a_users_network_are_code(tmp_path: Path, user: str) -> None:
    """Out of a checkpoint, with DataParallel's prefix; asked again in a process that has the weights too."""
    state = {f"module.{name}": value for name, value in small().state_dict().items()}
    path = weights(tmp_path / "checkpoint.pth", {"state_dict": state, "epoch": 3})
    subject = open_subject(str(path), contract=INPUT, arch=user)
    assert (subject.kind, subject.name) == ("module", f"{user} with checkpoint.pth")
    assert_is(subject, small())
    assert_answers_again(subject)
    strict = Policy.model_validate(
        {
            "criteria": ["robust_accuracy >= 0.1 at 95 %"],
            "threat": {"eps": "1/255"},
            "data": {"name": "digits"},
            "attacks": {"suite": "fast"},
            "subjects": ["onnx", "weights"],
        }
    )
    with pytest.raises(BadInput, match="is of kind module, the policy judges onnx, weights"):
        require_kind(subject, strict)


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("ran", "w")


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in small().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("state", "arch", "message"),
    [
        (small().state_dict(), None, "holds weights alone; name the network that they are of: --arch torchvision:NAME"),
        (without("0.bias"), "{user}", "lacks 1 of its 4 keys, first '0.bias'; name the network that was saved"),
        (
            {**without("0.bias"), "0.b": torch.zeros(4)},
            "{user}",
            "lacks 1 of its 4 keys, first '0.bias'; has 1 that are none of its, first '0.b'",
        ),
        (small(6).state_dict(), "{user}", "has 2 of other shapes, first '3.weight', 6x144 and 5x144"),
        (small(), "{user}", r"more than weights \(torch.nn.modules.container.Sequential\), which only code"),
        ({"net": {"0.weight": torch.zeros(1)}, "x": Hostile()}, "{user}", "holds more than weights"),
        ({"epoch": 3, "best": 0.5}, "{user}", r"holds no state dict \(epoch, best\)"),
        (torch.zeros(3), "{user}", r"holds no state dict \(Tensor\)"),
        (small().state_dict(), "torchvision:resnet18", "does not fit torchvision:resnet18: lacks"),
        (small().state_dict(), "torchvision:resnet", "'torchvision:resnet' is unknown; choose"),
        (small().state_dict(), "nobody:make", "nobody:make: cannot be made: ModuleNotFoundError"),
    ],
)
def test_weights_that_do_not_fit_are_bad_input(
    tmp_path: Path, user: str, state: object, arch: str | None, message: str
) -> None:
    """One line names the first key of each kind; what would run code to be read does not run."""
    path = weights(tmp_path / "model.pth", state)
    with pytest.raises(BadInput, match=message) as caught:
        open_subject(str(path), contract=INPUT, arch=arch.format(user=user) if arch else None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_timm_networks_are_named_as_torchvisions(tmp_path: Path) -> None:
    """Where timm is there, its network holds the weights; where it is not, the line says what to install."""
    path = weights(tmp_path / "model.pth", small().state_dict())
    try:
        import timm
    except ModuleNotFoundError:
        with pytest.raises(BadInput, match="timm:resnet10t needs timm; pip install timm"):
            open_subject(str(path), contract=INPUT, arch="timm:resnet10t")
        pytest.skip("timm is not installed: pip install timm")
    net = timm.create_model("resnet10t", num_classes=5).eval()
    weights(path, net.state_dict())
    subject = open_subject(str(path), contract="float32 NCHW 32x32x3", arch="timm:resnet10t")
    x = noise(subject.contract, 2)
    assert_same(subject.decide(x), net(x).detach())


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """Whatever its suffix; what is none of the others is read as ONNX, whose reader says why it is none."""
    (tmp_path / "text.txt").write_text("dear reader")
    (tmp_path / "cut.pth").write_bytes(weights(tmp_path / "w", small().state_dict()).read_bytes()[:200])
    kinds = {
        "text.txt": "onnx",
        script(tmp_path / "a", small(), torch.zeros(1, 3, 8, 8)).name: "torchscript",
        program(tmp_path / "b", small()).name: "program",
        "w": "weights",
        weights(tmp_path / "d.safetensors", small().state_dict()).name: "weights",
        to_onnx(tmp_path / "e", Tiny(), torch.zeros(2, 3, 8, 8)).name: "onnx",
    }
    assert {name: file_kind(tmp_path / name) for name in kinds} == kinds
    torch.save(small().state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    assert kind_of(str(tmp_path / "old")) == "weights"
    with pytest.raises(BadInput, match="not readable as ONNX"):
        open_subject(str(tmp_path / "text.txt"))
    shutil.copy(tmp_path / "e", tmp_path / "e.csv")
    assert file_kind(tmp_path / "e.csv") == "onnx"
    (tmp_path / "list.csv").write_text("path,label\na.png,cat\n")
    np.savez(tmp_path / "own.npz", x_test=np.zeros((2, 8, 8, 3), np.uint8), y_test=[0, 1])
    for name in ("list.csv", "own.npz"):
        with pytest.raises(BadInput, match=rf"{name}: holds images or a list of them, no model; name it with --data"):
            open_subject(str(tmp_path / name))
    with pytest.raises(BadInput, match=r"cut\.pth: is neither TorchScript, torch\.export's nor weights"):
        open_subject(str(tmp_path / "cut.pth"), contract=INPUT)


@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_archives_that_are_broken_are_bad_input(tmp_path: Path, kind: str) -> None:
    """A byte of the program changed, or another input than images: one line."""
    make = (lambda path: script(path, small(), torch.zeros(2, 3, 8, 8))) if kind == "ts" else (
        lambda path: program(path, small())
    )  # fmt: skip
    path = make(tmp_path / f"model.{kind}")
    with pytest.raises(BadInput, match="what images does it take"):
        open_subject(str(path))
    with pytest.raises(BadInput, match=f"model.{kind}: its module cannot take float32 NCHW"):
        open_subject(str(path), contract="float32 NCHW 8x8x1")
    with pytest.raises(BadInput, match="which takes no arch or output"):
        open_subject(str(path), contract=INPUT, arch="torchvision:resnet18", output="logits")
    data = bytearray(path.read_bytes())
    for start in range(0, len(data) - 400, 7):
        data[start] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        open_subject(str(path), contract=INPUT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["NHWC", "flat-HWC", "flat-CHW"])
def test_a_network_is_asked_in_its_layout(tmp_path: Path, layout: str, user: str) -> None:
    """A perceptron over rows, or channels last: answers and gradients are those of the network on these numbers."""
    (tmp_path / f"{NETWORK}.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(3)\n"
        "    return nn.Sequential(nn.Flatten(1), nn.Linear(60, 3))\n"
    )
    subject = open_subject(user, contract=f"float32 {layout} 4x5x3 imagenet")
    sys.path.insert(0, str(tmp_path))
    net = __import__(NETWORK).make()
    sys.path.remove(str(tmp_path))
    x = noise(subject.contract, 4)
    sent = subject.contract.scale.applied(x)
    rows = (sent if layout == "flat-CHW" else sent.permute(0, 2, 3, 1)).flatten(1)
    assert_same(subject.decide(x), net(rows).detach())
    assert subject.model is not None
    assert_same(subject.model(x).detach(), net(rows).detach())
    if layout == "flat-CHW":  # a process takes seconds
        assert_answers_again(subject)
