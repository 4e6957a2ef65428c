"""The processes of a run and their communication through torch.distributed. A single process communicates nothing."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep the process group alive
from torch import Tensor

from nanochat.errors import UserError

Result = TypeVar("Result")

TIMEOUT = timedelta(hours=2)
"""Timeout of one collective. The others wait in one while the main process tokenizes, evaluates or saves, for more
than ten minutes in a large run."""


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Join the processes that torchrun started, if it did."""
        world = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
        if world.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return world

    @property
    def is_main(self) -> bool:
        """True in the process that logs and saves."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True in one process per machine, which writes the files that every machine needs, such as token files."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over processes, in float64."""
        if self.size == 1:  # without a round trip to the device
            return [float(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def min(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return -self.min(-number)

    def any(self, flag: bool) -> bool:
        """True in every process if `flag` is true in any of them."""
        return self.sum(flag)[0] > 0

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite all processes' tensors with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def call_on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` in the main process; return its result, or raise its UserError, in all of them."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def leave(self) -> None:
        """Leave the process group. gloo's threads, which may abort a process that exits, end with it."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
