"""Several processes that share a job: a training, where gradients are averaged, or a gate, which gathers findings.

One flat all-reduce after the backward pass, by hand: the attack passes, most of the work, need none, so overlapping it
with the backward pass (as DistributedDataParallel does) would hide little, and weight perturbation, masks and several
views would each have to be taught to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dfmcl.common.errors import BadInput, DfmclError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; alone unless torchrun says otherwise."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def join() -> Ranks:
        """Meet the other processes, if torchrun started this one; NCCL on GPUs, Gloo on CPUs."""
        world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        if cuda and world > 1 and local >= torch.cuda.device_count():
            raise BadInput(
                f"torchrun: {local + 1} processes on a node with {torch.cuda.device_count()} GPUs; start fewer"
            )
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if world == 1:
            return Ranks(0, 1, device)
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        return Ranks(dist.get_rank(), world, device)

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """In place: each tensor becomes its mean over the processes."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: all stop at the same step."""
        if self.world == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def told(self, values: Sequence[float]) -> list[float]:
        """The first process's values, at every process."""
        if self.world == 1:
            return list(values)
        told = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return [float(value) for value in told.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, at every process."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Callable[[], None]) -> None:
        """The first process acts, the others wait for it; an error of ours that it meets is raised by all."""
        met: DfmclError | None = None
        if self.first:
            try:
                action()
            except DfmclError as error:
                met = error
        if told := self.gather(met)[0]:
            raise told

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> Ranks:
        """One process, whatever the environment says."""
        return Ranks(0, 1, torch.device(device))
