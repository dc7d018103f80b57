"""One update of the weights: views, attack, masks, objective, weight perturbation, optimizer, average."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.models import Classifier, to_float
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.threat import parse_eps
from dfmcl.training.averaging import MovingAverage
from dfmcl.training.awp import perturbed, perturbed_parameters
from dfmcl.training.config import TrainConfig
from dfmcl.training.crafts import craft_of
from dfmcl.training.cuda_graphs import Pass, recorded
from dfmcl.training.curriculum import attack_steps, draw, progress, strength
from dfmcl.training.feed import Batch, Whole, augmentations
from dfmcl.training.masking import DynamicFeatureMask, find_layer, has_pooled_linear_tail, running_statistics_kept
from dfmcl.training.noise import Noise
from dfmcl.training.objectives import OBJECTIVES, jensen_shannon, smoothed
from dfmcl.training.optimizer import build_optimizer, set_lr

BatchNorm = nn.modules.batchnorm._BatchNorm
Seen = tuple[list[Tensor], list[Tensor], Tensor]  # views, attacked views, targets


class Learner:
    """All that a run moves: network, batch norms of further views, masks, optimizer, average.

    Each network has a twin in eval mode that shares its storage: attacks are crafted on the twin, so that nothing
    switches mode, no weight gradient is computed there (a third of a backward pass), and a GPU records each once.
    """

    def __init__(self, config: TrainConfig, model: Classifier, total_steps: int, ranks: Ranks) -> None:
        self.config, self.total_steps, self.ranks = config, total_steps, ranks
        self.beta = parse_eps(config.curriculum.beta)
        self.device = ranks.device
        shares, size = ranks.world * config.optimization.accumulate, config.optimization.batch_size
        if size % shares:
            told = f"{ranks.world} processes" if shares == ranks.world else f"{shares} parts (optimization.accumulate)"
            raise BadInput(f"optimization.batch_size: {size} is no multiple of {told}")
        height, width, channels = model.spec.input_shape
        self.pool = {member: craft_of(member, (channels, height, width)) for member in config.curriculum.attacks}
        self.layout = layout_of(model)
        model = model.to(self.device).to(memory_format=self.layout)
        synchronised = config.model.batch_norm == "synchronised" and ranks.world > 1
        if synchronised:
            if self.device.type != "cuda":
                raise BadInput("model.batch_norm: synchronised needs GPUs; use batch or frozen on CPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        freeze(model, config.model.frozen)
        self.model = model
        self.mask = DynamicFeatureMask(config.masking).to(self.device)
        if config.masking.enabled:
            find_layer(model, config.masking.layer)
        # Views of another distribution go through batch norms of their own (Xie et al. 2020), all else is shared.
        self.networks = [model] + ([with_own_batch_norm(model)] if config.objective.views else [])
        self.twins = [twin(network) for network in self.networks]
        self.average = MovingAverage(model, config.optimization.ema) if config.optimization.ema else None
        self.optimizer = build_optimizer(config, self.networks, self.mask)
        for network in self.networks:
            set_training(network, config)
        whole = [network.features if network.is_resnet else network for network in self.networks]
        self.crafting: list[Pass] = list(self.twins)
        # By view: a network sees clean and adversarial images of each before the one backward pass of all.
        views = [min(number, 1) for number in range(1 + config.objective.views)]
        self.trunks: list[dict[str, Pass]] = [{"clean": whole[n], "adversarial": whole[n]} for n in views]
        if self.device.type == "cuda" and config.optimization.graphs == "auto" and not synchronised:
            self.record(whole, views)
        self.fallen_back = False  # the FGSM share has been given to N-FGSM
        self.p: Tensor | None = None

    def record(self, whole: Sequence[Pass], views: Sequence[int]) -> None:
        """Have a GPU run each pass as one graph. whole: of each network; views: the network of each."""
        height, width, channels = self.model.spec.input_shape
        size = self.config.optimization.batch_size // (self.ranks.world * self.config.optimization.accumulate)
        example = torch.rand(size, channels, height, width, device=self.device)
        example = example.contiguous(memory_format=self.layout)

        def record(network: nn.Module, function: Pass, wanted: bool) -> Pass:
            return recorded(network, function, example.clone().requires_grad_(wanted), self.autocast(cache=False))

        masks = self.config.masking
        used = {  # what `forward` takes; a layer that is masked from outside needs hooks, which a graph passes over
            "clean": self.config.objective.name != "ce",
            "adversarial": not masks.enabled or has_pooled_linear_tail(self.model, masks.layer),
        }
        if self.config.curriculum.attacks:
            self.crafting = [record(network, network, True) for network in self.twins]
        self.trunks = [
            {name: record(self.networks[n], whole[n], False) if wanted else whole[n] for name, wanted in used.items()}
            for n in views
        ]

    @property
    def result(self) -> Classifier:
        """The network that is measured and kept: the average, where there is one."""
        return self.model if self.average is None else cast(Classifier, self.average.network)

    def update(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Step t in 1..T on the whole batch `(N, H, W, C)` uint8: returns this process's mean loss, before the step."""
        loss = self.loss(images, labels, step)
        self.apply(step)
        return loss

    def loss(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """`loss_of` a whole batch `(N, H, W, C)` uint8."""
        return self.loss_of(Whole(images, labels), step)

    def loss_of(self, batch: Batch, step: int) -> Tensor:
        """Gradients of step t's objective, in `.grad`; returns its value.

        A batch in parts meets the same numbers as whole: a part is the share of one of so many processes.
        """
        chosen = self.config.optimization
        parts = chosen.accumulate
        noises = [
            Noise(
                generator(self.config.seed, "step", step, device=self.device),
                self.ranks.rank * parts + part,
                self.ranks.world * parts,
            )
            for part in range(parts)
        ]
        self.optimizer.zero_grad(set_to_none=True)
        seen = [self.seen(batch, step, noise) for noise in noises]
        if not (chosen.awp and step > chosen.awp_start * self.total_steps):
            return self._backward(seen, noises)
        weights = perturbed_parameters(self.model)
        gradients = [torch.zeros_like(weight) for weight in weights]
        with running_statistics_kept(self.model):
            for (views, attacked, target), noise in zip(seen, noises, strict=True):
                worst = self.objective(views[:1], attacked[:1], target, noise) / parts
                torch._foreach_add_(gradients, [_full(one) for one in torch.autograd.grad(worst, weights)])
        self.ranks.average(gradients)
        with perturbed(weights, gradients, chosen.awp):
            return self._backward(seen, noises)

    def seen(self, batch: Batch, step: int, noise: Noise) -> Seen:
        """What this part of the batch shows the network: its views, the same attacked, and the targets."""
        images, y = batch.share(augmentations(self.config), noise)
        target = smoothed(y, self.model.spec.classes, self.config.objective.label_smoothing)
        views = [self.view(view) for view in images]
        return views, [self.craft(x, y, step, noise, number) for number, x in enumerate(views)], target

    def _backward(self, seen: Sequence[Seen], noises: Sequence[Noise]) -> Tensor:
        losses = []
        for (views, attacked, target), noise in zip(seen, noises, strict=True):
            loss = self.objective(views, attacked, target, noise) / len(seen)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def apply(self, step: int) -> None:
        """Move the weights by the gradients that `loss` left."""
        chosen = self.config.optimization
        shared = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.ranks.average(shared)
        set_lr(self.optimizer, self.config, step, self.total_steps)
        self.optimizer.step()
        if self.config.model.batch_norm == "batch":  # each process saw its own part: the statistics meet in the middle
            self.ranks.average([b for network in self.networks for b in network.buffers() if b.is_floating_point()])
        if self.average is not None:
            if step <= chosen.ema_start * self.total_steps:
                self.average.restart(self.model)
            else:
                self.average.update(self.model)

    def view(self, images: Tensor) -> Tensor:
        return to_float(images).to(self.model.mean.dtype).contiguous(memory_format=self.layout)

    def craft(self, x: Tensor, y: Tensor, step: int, noise: Noise, view: int) -> Tensor:
        """Adversarial images of step t for one view, on the twin of its network."""
        chosen = self.config.curriculum
        eps = self.strength(step)
        if not chosen.attacks or eps == 0:
            return x
        name = draw(chosen.attacks, self.config.seed, step, chosen.weights)
        craft = self.pool[name]
        if name == "fgsm" and self.fallen_back:
            craft = craft_of("n-fgsm", tuple(x.shape[1:]))
        done = progress(step, self.total_steps, chosen.warmup, chosen.hold)
        steps = attack_steps(chosen.steps, chosen.final_steps, done)
        model = self.crafting[min(view, 1)]

        def forward(z: Tensor) -> Tensor:
            with self.autocast():
                logits: Tensor = model(z)
            return _full(logits)

        share = eps / self.beta
        return craft(forward, x, y, eps, noise, steps=steps, step_ratio=chosen.step_ratio, done=share)

    def strength(self, step: int) -> float:
        """S(t) in pixel units; 0 where training is on clean images."""
        chosen = self.config.curriculum
        if not chosen.attacks:
            return 0.0
        return strength(step, self.total_steps, self.beta, chosen.schedule, chosen.warmup, chosen.hold)

    def objective(self, views: Sequence[Tensor], attacked: Sequence[Tensor], target: Tensor, noise: Noise) -> Tensor:
        """The mean loss over images and views, with consistency between views and the prior on the masks."""
        chosen = self.config.objective
        losses, seen = [], []
        for number, (x, x_adv) in enumerate(zip(views, attacked, strict=True)):
            clean = self.forward(number, x, target, noise, attacked=False)[0] if chosen.name != "ce" else None
            aim = torch.softmax(clean.detach(), dim=1) if clean is not None and chosen.name == "trades" else target
            adversarial, extra = self.forward(number, x_adv, aim, noise, attacked=True)
            seen.append(adversarial if clean is None else clean)
            # `ce` looks at adversarial images only.
            both = (adversarial if clean is None else clean, adversarial)
            losses.append(OBJECTIVES[chosen.name](*both, target, chosen.regularization) + extra)
        loss = torch.stack(losses).mean()
        if len(seen) > 1 and chosen.consistency:
            loss = loss + chosen.consistency * jensen_shannon(seen).mean()
        return loss

    def forward(
        self, view: int, x: Tensor, target: Tensor, noise: Noise, *, attacked: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Logits of a forward pass in training mode, in float32, and what the masks add to each image's loss.

        Adversarial images are seen under masks, clean ones without.
        """
        masked = attacked and self.config.masking.enabled
        model = self.networks[min(view, 1)]
        trunk = self.trunks[view]["adversarial" if attacked else "clean"]
        with self.autocast():
            if masked:
                features = trunk if model.is_resnet else None
                logits, p = self.mask(model, x, target, noise, features=features)
            elif model.is_resnet:
                logits = model.head(trunk(x))
            else:
                logits = trunk(x)
        if not masked:
            return _full(logits), 0.0
        if view == 0:
            self.p = p.detach()
        return _full(logits), self.mask.penalty(p) if self.config.masking.prior else 0.0

    def falls_back(self, robust: Sequence[float]) -> bool:
        """Look at held-out PGD accuracy, epoch by epoch; true when FGSM's share has just gone to N-FGSM."""
        chosen = self.config.curriculum
        collapsed = chosen.fgsm_fallback > 0 and max(robust) - robust[-1] > chosen.fgsm_fallback
        if self.fallen_back or not collapsed or "fgsm" not in chosen.attacks:
            return False
        self.fallen_back = True
        return True

    def autocast(self, *, cache: bool = True) -> torch.autocast:
        """bfloat16 where the config asks for it: convolutions and products, not reductions."""
        wanted = self.config.optimization.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted, cache_enabled=cache)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {
            "networks": [network.state_dict() for network in self.networks],
            "mask": self.mask.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fallen_back": self.fallen_back,
            **average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for network, saved in zip(self.networks, state["networks"], strict=True):
            network.load_state_dict(saved)
        self.mask.load_state_dict(state["mask"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fallen_back = state["fallen_back"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def layout_of(model: nn.Module) -> torch.memory_format:
    """channels_last, which is faster; not where oneDNN writes past a buffer of its own (torch 2.14).

    It does so for the weight gradient of a 1x1 convolution of stride 2: on AVX2 over channels that are no multiple of
    eight, on AVX512 with more than one thread over fewer than 16.
    """
    strided = (m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and m.kernel_size == (1, 1))
    unsafe = any(module.in_channels % 8 or module.in_channels < 16 for module in strided)
    return torch.contiguous_format if unsafe else torch.channels_last


def _full(tensor: Tensor) -> Tensor:
    """In float32, which bfloat16 leaves for products alone; in float64 where the network computes so."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def with_own_batch_norm(model: Classifier) -> Classifier:
    """A copy that shares every weight with the model but has batch norms of its own."""
    own = {id(tensor) for module in batch_norms(model) for tensor in (*module.parameters(), *module.buffers())}
    shared = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def twin(model: Classifier) -> Classifier:
    """A frozen copy in eval mode over the same storage: what an optimizer does to the model it does to the twin."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared).eval()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def set_training(model: Classifier, config: TrainConfig) -> None:
    """Training mode; batch norm stays in eval mode where the config freezes it, or the module that it lies in."""
    model.train()
    still = (
        [model] if config.model.batch_norm == "frozen" else [find_layer(model, name) for name in config.model.frozen]
    )
    for module in (norm for part in still for norm in batch_norms(part)):
        module.eval()


def freeze(model: Classifier, names: Sequence[str]) -> None:
    """Keep the weights of these modules as they are. BadInput for a name that is none, or where nothing is left."""
    for name in names:
        find_layer(model, name, "model.frozen").requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(f"model.frozen: {', '.join(names)} are all there is; leave the head to be trained")
