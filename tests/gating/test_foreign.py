"""A user's module may be anything: each failure is bad input in one line, and what gives no gradient says so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.module import module_subject
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import to_bytes
from dfmcl.robustness.onnx_graph import noise
from dfmcl.robustness.threats.registry import parse_threat

NAME = "dfmcl_module_of_a_user"
CONTRACT = "float32 NCHW 8x8x3"
HEAD = """
import sys
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 5)
    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))

class Boom(BaseException): pass
"""
FORWARD = "class Made(Net):\n    def forward(self, x):\n        y = super().forward\n        {}\nmake = Made\n"
GOOD = {
    "plain": "return y(x)",
    "view of the images": "return x.view(x.shape[0], -1)[:, ::40] * 3",
    "view of a layer": "return self.head(torch.tanh(self.conv(x)).view(len(x), -1))",
    "float64 inside": "return y(x).double()",
    "float16 answers": "return y(x).half()",
    "in place": "x.sub_(0.5).div_(0.5); return y(x)",
    "turns training on": "self.train(); return y(x)",
}
BLIND = {
    "detached": "return y(x).detach()",
    "detaches its input": "return y(x.detach())",
    "no_grad": "\n        with torch.no_grad(): return y(x)",
    "inference mode": "\n        with torch.inference_mode(): return y(x)",
    "numpy": "return torch.from_numpy(x.numpy().reshape(len(x), -1)[:, ::40])",
    "detached numpy": "return torch.from_numpy(x.detach().numpy().reshape(len(x), -1)[:, ::40].astype(np.float64))",
    "thresholds": "return y((x > 0.5).float())",
}
BAD = {
    "tuple": ("return y(x), x", "its module gives a tuple, expected a tensor of logits"),
    "dict": ("return {{'logits': y(x)}}", "its module gives a dict, expected a tensor"),
    "one image for all": ("return y(x)[:1]", r"2 images gave float32 \(1, 5\); expected float logits \(N, K\)"),
    "squeezed": ("return y(x)[:, 0]", r"2 images gave float32 \(2,\)"),
    "one class": ("return y(x)[:, :1]", r"2 images gave float32 \(2, 1\)"),
    "whole numbers": ("return (9 * y(x)).long()", r"2 images gave int64 \(2, 5\)"),
    "raises": ("raise ValueError('many\\nlines')", "cannot take float32 NCHW .2, 3, 8, 8.: ValueError: many$"),
    "recurses": ("return self.forward(x)", "RecursionError"),
    "exits": ("sys.exit(0)", "SystemExit: 0"),
    "raises no Exception": ("raise Boom('x')", "Boom: x"),
    "needs a GPU": ("return y(x.to('cuda:77'))", "its module cannot take float32 NCHW"),
}
BACK = """
class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, upstream):
        {}
        return upstream
"""
MAKERS = {
    "needs an argument": ("def make(path): return Net()", "cannot be made: TypeError: make.. missing 1 required"),
    "is a module already": ("make = Net()", "cannot be made: TypeError"),
    "returns a class": ("def make(): return Net", "returned a type; it must return a torch.nn.Module"),
    "fails at import": ("raise OSError('no weights')", "cannot be made: OSError: no weights"),
    "exits at import": ("sys.exit(0)", "cannot be made: SystemExit: 0"),
    "is not Python": ("def make(", "cannot be made: SyntaxError"),
    "has no eval mode": (
        "def make(): return torch.export.export(Net(), (torch.rand(2, 3, 8, 8),)).module()",
        "cannot be brought into float32 and eval mode: NotImplementedError",
    ),
    "has no values": ("def make(): return Net().to('meta')", "its answer cannot be read: NotImplementedError"),
    "holds what has no bytes": (
        "class make(Net):\n    def get_extra_state(self): return (i for i in [])\n",
        "no digest can be taken of its module's state: TypeError",
    ),
    "imports what is not there": ("import no_such_package", "cannot be made: ModuleNotFoundError"),
}
Write = Callable[..., Subject]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module beside the user and makes a subject of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str, contract: str = CONTRACT) -> Subject:
        sys.modules.pop(NAME, None)
        (tmp_path / f"{NAME}.py").write_text(HEAD + text)
        return module_subject(f"{NAME}:make", contract)

    return write


def attacked(subject: Subject, images: int) -> tuple[int, int]:
    """How many of so many images hold against PGD with the subject's gradients, or Square without; and of how many."""
    from dfmcl.robustness.attacks.registry import Attack

    data = to_bytes(noise(subject.contract, images)).numpy()
    with torch.no_grad():
        labels = subject.decide(torch.from_numpy(data).permute(0, 3, 1, 2) / 255).argmax(dim=1).numpy()
    attack = Attack.parse("pgd-3" if subject.model is not None else "square-5")
    outcome = evaluate(subject.model, data, labels, parse_threat("8/255"), [attack], decide=subject.decide)
    return outcome.evaluation.robust.k, outcome.evaluation.clean.k


@pytest.mark.parametrize("what", GOOD)
def test_a_module_that_answers_is_attacked_by_its_gradients(write: Write, what: str) -> None:
    """Whatever it does with its input, in batches large (which come with their channels last) and small."""
    subject = write(FORWARD.format(GOOD[what]))
    assert (subject.classes, subject.no_gradients) == (5, "")
    held, right = attacked(subject, 40)
    assert held <= right == 40


@pytest.mark.parametrize("what", BLIND)
def test_a_module_without_gradients_is_a_black_box(write: Write, what: str) -> None:
    """It still answers, and says why only black-box attacks can ask it."""
    subject = write(FORWARD.format(BLIND[what]))
    assert subject.model is None
    assert "gradient" in subject.no_gradients or "numpy" in subject.no_gradients
    assert "\n" not in subject.no_gradients
    assert attacked(subject, 40)[1] == 40


@pytest.mark.parametrize("what", BAD)
def test_a_module_that_is_no_classifier_is_bad_input(write: Write, what: str) -> None:
    """One line that names it and its failure, exit code 2."""
    forward, message = BAD[what]
    with pytest.raises(BadInput, match=message) as caught:
        write(FORWARD.format(forward.replace("{{", "{").replace("}}", "}")))
    assert str(caught.value).startswith(f"{NAME}:make: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("what", MAKERS)
def test_a_module_that_cannot_be_made_is_bad_input(write: Write, what: str) -> None:
    """The user's own code may fail in any way before there is a module."""
    text, message = MAKERS[what]
    with pytest.raises(BadInput, match=message) as caught:
        write(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "late",
    ["if len(x) > 20: raise ValueError('too many')", "if len(x) > 20: return y(x)[:20]", "if len(x) > 20: exit()"],
)
def test_a_module_that_fails_later_is_bad_input_too(write: Write, late: str) -> None:
    """What a small batch does not show is told in the same words when the attacks come to it."""
    subject = write(FORWARD.format(f"{late}\n        return y(x)"))
    with pytest.raises(BadInput, match=f"^{NAME}:make: "):
        attacked(subject, 40)


def test_gradients_that_end_later_are_bad_input_too(write: Write) -> None:
    """A large batch that detaches would leave the attacks standing still, or end them in an error of torch's."""
    subject = write(FORWARD.format("return y(x).detach() if len(x) > 20 else y(x)"))
    assert subject.model is not None
    with pytest.raises(BadInput, match="no gradient reaches the image: its forward detaches it"):
        attacked(subject, 40)


@pytest.mark.parametrize("late", ["if len(x) > 20: raise ValueError('too many')", "if len(x) > 20: sys.exit(0)"])
def test_a_backward_pass_that_fails_later_is_bad_input_too(write: Write, late: str) -> None:
    """Operators of the user's own may fail on the way back only."""
    subject = write(BACK.format(late.replace("x)", "upstream)")) + FORWARD.format("return y(Back.apply(x))"))
    assert subject.model is not None
    with pytest.raises(BadInput, match=f"^{NAME}:make: its gradient cannot be computed at float32 NCHW"):
        attacked(subject, 40)


STATES = {
    "quantised layers": "torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)",
    "a state of its own": "Extra()",
    "a sparse buffer": "Sparse()",
}


@pytest.mark.parametrize("what", STATES)
def test_a_state_of_any_kind_has_a_digest(write: Write, what: str) -> None:
    """Not all that a module keeps is a dense tensor; the same made again is the same."""
    text = (
        "class Extra(Net):\n    def get_extra_state(self): return {'version': 1}\n"
        "class Sparse(Net):\n    def __init__(self):\n"
        "        super().__init__()\n        self.register_buffer('eye', torch.eye(3).to_sparse())\n"
    )
    one, again = (write(f"{text}def make(): return {STATES[what]}") for _ in range(2))
    assert one.digest == again.digest != write(f"{text}make = Net").digest


def test_an_operation_in_place_does_not_reach_our_images(write: Write) -> None:
    """The images that are judged are the ones that were read."""
    subject = write(FORWARD.format("x.zero_(); return y(x)"))
    x = noise(subject.contract, 4)
    kept = x.clone()
    subject.decide(x)
    assert torch.equal(x, kept)


def test_a_script_and_a_module_without_weights_are_modules(write: Write) -> None:
    """TorchScript can be copied and climbed; what has no parameter lies on the CPU."""
    script = "make = lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)))"
    bare = "class make(nn.Module):\n    def forward(self, x): return x.flatten(1)[:, ::40]"
    for text in (script, bare):
        subject = write(text)
        held, right = attacked(subject, 20)
        assert held <= right == 20


KINDS = {
    "a script": "make = lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)))",
    "a trace": "make = lambda: torch.jit.trace(Net(), torch.zeros(1, 3, 8, 8))",
    "a graph": "import torch.fx\nmake = lambda: torch.fx.symbolic_trace(Net())",
}


@pytest.mark.parametrize("what", KINDS)
def test_what_a_module_of_any_kind_keeps_can_be_told(write: Write, what: str) -> None:
    """A forward may be compiled, or lie in no file; asked once more, an honest module keeps no more."""
    subject = write(KINDS[what])
    assert subject.state is not None
    before = subject.state()
    subject.decide(noise(subject.contract, 2))
    assert before == subject.state() != {}


COUNTERS = {
    "in itself": "self.calls = getattr(self, 'calls', 0) + 1",
    "in its class": "Made.calls = getattr(Made, 'calls', 0) + 1",
    "in its file": "global calls; calls = globals().get('calls', 0) + 1",
}


@pytest.mark.parametrize("where", COUNTERS)
def test_a_module_that_counts_keeps_something_else(write: Write, where: str) -> None:
    """A number of calls is found wherever a module can keep it plainly."""
    subject = write(FORWARD.format(f"{COUNTERS[where]}; return y(x)"))
    assert subject.state is not None
    before = subject.state()
    subject.decide(noise(subject.contract, 2))
    assert before != subject.state()


def test_a_module_in_float64_is_asked_in_float32_unless_declared(write: Write) -> None:
    """Its own precision where the contract says so."""
    for contract, dtype in ((CONTRACT, torch.float32), (CONTRACT.replace("32", "64", 1), torch.float64)):
        subject = write("def make(): return Net().double()", contract)
        assert isinstance(subject.model, nn.Module)
        assert {value.dtype for value in subject.model.state_dict().values()} == {dtype}
        logits: Tensor = subject.decide(noise(subject.contract, 3))
        assert logits.dtype == torch.float32


def test_a_default_type_of_the_modules_is_not_ours(write: Write) -> None:
    """A module that sets torch's default at import changes itself, and none of our sums."""
    subject = write("torch.set_default_dtype(torch.float64)\nmake = Net")
    assert torch.get_default_dtype() == torch.float32
    assert attacked(subject, 20)[1] == 20


def test_a_module_is_asked_in_the_layout_that_is_declared(write: Write) -> None:
    """One that convolves cannot take its channels last, and says in which layout it was asked."""
    with pytest.raises(BadInput, match=r"its module cannot take float32 NHWC \(2, 8, 8, 3\)"):
        write("make = Net", "float32 NHWC 8x8x3")
