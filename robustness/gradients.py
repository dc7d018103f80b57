"""The pass that attacks climb: a frozen copy of a network, made fast, for logits and gradients in the input only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfmcl.common.errors import BadInput, DfmclError
from dfmcl.robustness.losses import margin, value_and_gradient
from dfmcl.robustness.models import frozen
from dfmcl.robustness.portions import Portions

PRECISIONS = ("auto", "bfloat16", "float32")
IMAGES = 4  # enough for a proof: what was folded wrongly, or has no precision, is wrong on each
# Of the largest logit, and of the median image's gradient. Sums in another order differ by 3e-6 of either.
LOGITS = GRADIENTS = 1e-4
ALIKE = 0.9  # cosine of bfloat16's gradient to float32's, median image; 0.998 in a hardened ResNet-18


class AttackPass(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to float32 logits `(N, K)`, with the weights of the time it was made.

    precision: of convolutions and products, the last layer apart. folded: batch norms that went into convolutions.
    portions: in which it is asked, which all copies of a network share.
    It decides nothing: an image has fallen where the frame says so, in float32 on the artefact.
    """

    def __init__(
        self,
        network: nn.Module,
        memory_format: torch.memory_format,
        precision: str,
        folded: int,
        portions: Portions,
        exact: AttackPass | None = None,
    ) -> None:
        super().__init__()
        self.network, self.memory_format, self.precision, self.folded = network, memory_format, precision, folded
        self.portions = portions
        self._exact = (exact,)  # in a tuple: a module of its own would be frozen, moved and counted twice

    @property
    def exact(self) -> AttackPass:
        """The same in float32, for attacks without gradients: they compare scores that differ by less than bfloat16's
        steps, which cost Square 2 points of its strength."""
        return self._exact[0] or self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the graph of the images whose gradient is wanted: the caller takes portions
            return self._passed(x)
        (logits,) = self.portions.joined(lambda rows: (self._passed(x[rows]),), len(x))
        return logits

    def _passed(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits: Tensor = self.network(x)
        return logits.float()


def attack_pass(model: nn.Module, example: Tensor, *, precision: str = "auto") -> AttackPass:
    """A fast copy of the model in eval mode; it does not follow the model's weights, so make it anew when they change.

    example: images `(N, C, H, W)` in [0, 1] such as will be attacked, on the model's device. On the first of them each
    shortcut is proven, or left out: in float32, logits and gradients are the model's up to rounding; bfloat16, which
    "auto" takes where the hardware has it, must point where float32 points. A model that answers otherwise with every
    shortcut, or cannot be copied, is used itself.
    """
    if precision not in PRECISIONS:
        raise BadInput(f"precision: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    example = example[:IMAGES]
    with frozen(model), _full_float32():
        itself = as_it_is(model, example)
        truth = _Answers.of(itself, example)
        y = truth.logits.argmax(dim=1)
        formats, folds = (torch.channels_last, torch.contiguous_format), (True, False)
        copies = (partial(_copied, itself, example, *which) for which in product(formats, folds))
        chosen = _first(copies, lambda made: truth.equal(_Answers.of(made, example, y))) or itself
        if chosen is not itself and (precision == "bfloat16" or (precision == "auto" and has_bfloat16(example.device))):
            halves = [partial(_in_bfloat16, chosen, example)]
            chosen = _first(halves, lambda made: truth.alike(_Answers.of(made, example, y))) or chosen
    return chosen


def as_it_is(model: nn.Module, example: Tensor) -> AttackPass:
    """The model itself, asked in portions. example: as for `attack_pass`."""
    return AttackPass(model, torch.contiguous_format, "float32", 0, Portions.of(model, example))


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster there: a GPU that computes in it, or a CPU with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return device.type == "cpu" and bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class _Answers:
    """Logits `(N, K)` on the example, and each image's gradient `(N, C H W)` of the margin to its class, in float64.

    The margin's does not vanish where a softmax is sure of itself, as the cross-entropy's does.
    """

    logits: Tensor
    gradient: Tensor

    @staticmethod
    def of(model: AttackPass, example: Tensor, y: Tensor | None = None) -> _Answers:
        """y: the classes `(N,)`; default: the model's own."""

        def own(logits: Tensor) -> Tensor:
            return margin(logits, logits.argmax(dim=1))

        loss, labels = (own, ()) if y is None else (margin, (y,))
        _, gradient, logits = value_and_gradient(model, example, loss, labels, True)
        return _Answers(logits, gradient.flatten(1).double())

    def equal(self, other: _Answers) -> bool:
        """Up to rounding; false where anything is not a number. One image in a few may lie at the kink of a ReLU."""
        near = (self.logits - other.logits).abs().amax() <= LOGITS * self.logits.abs().amax()
        turned = (self.gradient - other.gradient).norm(dim=1) / self.gradient.norm(dim=1)
        return bool(near and turned.median() <= GRADIENTS)

    def alike(self, other: _Answers) -> bool:
        """Whether the gradients point the same way; false where there are none."""
        products = (self.gradient * other.gradient).sum(dim=1)
        cosine = products / (self.gradient.norm(dim=1) * other.gradient.norm(dim=1))
        return bool(cosine.median() >= ALIKE)


def _first(made: Iterable[Callable[[], AttackPass]], accepts: Callable[[AttackPass], bool]) -> AttackPass | None:
    """The first that can be made, can run and is accepted."""
    for make in made:
        try:
            attempt = make()
            if accepts(attempt):
                return attempt
        except BadInput:  # a foreign model's own way of failing
            continue
        except DfmclError:  # work that is told to end, not a copy that fails
            raise
        except Exception:  # noqa: BLE001  # a foreign model may raise anything: `view` knows no channels_last
            continue
    return None


def _copied(itself: AttackPass, example: Tensor, memory_format: torch.memory_format, fold: bool) -> AttackPass:
    network = copy.deepcopy(itself.network).to(memory_format=memory_format)
    pairs = _pairs(network, example) if fold else []
    for conv, norm in pairs:
        _replace(network, conv, fuse_conv_bn_eval(conv, norm).to(memory_format=memory_format))
        _replace(network, norm, nn.Identity())
    return AttackPass(network, memory_format, "float32", len(pairs), itself.portions)


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions with the batch norm that reads their output, each called once in a pass over the example.

    Where something else reads that output too, the folded network answers otherwise and is not accepted.
    """
    outputs: list[tuple[nn.Conv2d, Tensor, int]] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            outputs.append((module, output, output._version))
        elif isinstance(module, nn.BatchNorm2d) and not module.training and inputs:
            # A version that has moved: something was done to the output in place before the batch norm read it.
            pairs.extend((conv, module) for conv, y, was in outputs if y is inputs[0] and y._version == was)

    _observed(network, example, (nn.Conv2d, nn.BatchNorm2d), after)
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _in_bfloat16(made: AttackPass, example: Tensor) -> AttackPass:
    """The same under autocast. Weights are cast here, once; those of the last linear layer stay as they are.

    Logits of three digits would tie where an attack asks whether the loss has risen.
    """
    network, linear = copy.deepcopy(made.network), list[nn.Module]()
    _observed(network, example, (nn.Linear,), lambda module, inputs, output: linear.append(module))
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear) and module not in linear[-1:]:
            module.to(torch.bfloat16)
    if linear:
        _replace(network, linear[-1], _Float32.of(linear[-1]))
    return AttackPass(network, made.memory_format, "bfloat16", made.folded, made.portions, exact=made)


class _Float32(nn.Linear):
    """A linear layer that autocast leaves alone; still one, as onnx2pytorch's networks ask what their layers are."""

    @staticmethod
    def of(layer: nn.Module) -> _Float32:
        if type(layer) is not nn.Linear:
            raise TypeError(f"{type(layer).__name__} may compute something else")
        made = _Float32(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def _observed(
    network: nn.Module, example: Tensor, kinds: tuple[type[nn.Module], ...], after: Callable[..., None]
) -> None:
    """A pass over one image; `after(module, inputs, output)` is called when a module of exactly these kinds answers."""
    hooks = [module.register_forward_hook(after) for module in network.modules() if type(module) in kinds]
    try:
        with torch.no_grad():
            network(example[:1])
    finally:
        for hook in hooks:
            hook.remove()


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@contextmanager
def _full_float32() -> Iterator[None]:
    """A GPU's 19-bit TF32, on by default in convolutions, would blur what is compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
