"""What moves the weights: groups of parameters, their learning rates, and the rates' course over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dfmcl.robustness.models import Classifier
from dfmcl.training.config import TrainConfig


def build_optimizer(config: TrainConfig, networks: Sequence[Classifier], mask: nn.Module) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD with Nesterov momentum; alpha is exempt from weight decay, which would make all p alike.

    A group's `share` is what the learning rate is multiplied by.
    """
    chosen = config.optimization
    groups = [{**group, "weight_decay": chosen.weight_decay} for group in layered(networks, chosen.layer_decay)]
    groups.append({"params": list(mask.parameters()), "weight_decay": 0.0, "share": 1.0})
    fused = networks[0].mean.device.type == "cuda"
    if chosen.optimizer == "sgd":
        nesterov = chosen.momentum > 0
        return torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.momentum, nesterov=nesterov, fused=fused)
    adam = torch.optim.AdamW if chosen.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, lr=chosen.lr, fused=fused)


def layered(networks: Sequence[Classifier], decay: float) -> list[dict[str, Any]]:
    """Parameters that are not frozen, in groups of equal learning rate: `share` is decay to the power of their depth.

    The last block with weights, the head, has depth 0. What lies in no block (a class token) is as deep as the first.
    """
    weights = list({id(p): p for network in networks for p in network.parameters() if p.requires_grad}.values())
    if decay == 1:
        return [{"params": weights, "share": 1.0}]
    depth: dict[int, int] = {}
    for network in networks:
        blocks = [block for block in blocks_of(network.net) if any(True for _ in block.parameters())]
        for number, block in enumerate(reversed(blocks)):
            depth |= {id(parameter): number for parameter in block.parameters()}
    deepest = max(depth.values())
    members: dict[int, list[nn.Parameter]] = {}
    for weight in weights:
        members.setdefault(depth.get(id(weight), deepest), []).append(weight)
    return [{"params": members[number], "share": decay**number} for number in sorted(members)]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """A network's children in order; of a sequence its members, one by one."""
    found: list[nn.Module] = []
    for child in network.children():
        found += blocks_of(child) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return found


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Of step 1..T: a linear warm-up over the first lr_warmup share, then constant, or down to near zero at the end."""
    chosen = config.optimization
    at, warm = (step - 1) / total_steps, chosen.lr_warmup
    if at < warm:
        return chosen.lr * min(1.0, step / (warm * total_steps))  # a share below one step is no warm-up
    done = (at - warm) / (1 - warm) if warm < 1 else 0.0
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return chosen.lr * shapes[chosen.lr_schedule]


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total_steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total_steps) * group["share"]
