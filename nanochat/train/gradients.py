"""The gradient of one step, over all micro-batches and processes."""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanochat.data.batches import Batch
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, is_out_of_memory
from nanochat.train import memory
from nanochat.train.optim import MuonAdamW
from nanochat.train.sharding import GradientSum, clip_gradients


class StepResult(NamedTuple):
    """What the gradients of one step came from."""

    loss: float
    """mean over the tokens of the step, in nats"""
    tokens: int
    """trained on, over all processes"""
    gradient_norm: float
    """before clipping"""


class StepGradients:
    """Puts the gradients of a step where the optimizer finds them: in each process those of its own shards."""

    def __init__(self, model: GPT, optimizer: MuonAdamW, runtime: Runtime, grad_clip: float) -> None:
        """`grad_clip`: the largest global norm; 0 for any."""
        self.model = model
        self.shards = optimizer.own_shards
        self.runtime = runtime
        self.grad_clip = grad_clip or math.inf
        self._sum = GradientSum(optimizer.shards, runtime.world)

    def compute(self, batches: Sequence[Batch], device_batch_size: int) -> StepResult:
        """Gradients of the mean loss over all processes, with at most `device_batch_size` rows in a forward pass.

        The mean is over the tokens of the whole step, so micro-batches and processes with fewer of them weigh less,
        one that has none does no harm, and neither does another `device_batch_size`. Raises memory.ExhaustedError, in
        every process, if one of them ran out of memory.
        """
        own_tokens = sum(batch.num_trained for batch in batches)
        tokens = int(self.runtime.world.sum(own_tokens)[0])
        if tokens == 0:
            return StepResult(0.0, 0, 0.0)
        self.model.zero_grad()
        loss = self._accumulate([part for batch in batches for part in batch.split(device_batch_size)], tokens)
        self._sum.finish()  # also without memory, for the others wait for it
        total, exhausted = self.runtime.world.sum(loss or 0.0, loss is None)
        if exhausted:
            raise memory.ExhaustedError
        return StepResult(total, tokens, clip_gradients(self.shards, self.runtime.world, self.grad_clip))

    def _accumulate(self, batches: Sequence[Batch], tokens: int) -> float | None:
        """This process's part of the loss, its gradients added up; None if memory ran out."""
        total = torch.zeros((), device=self.runtime.device)
        try:
            for number, batch in enumerate(batches, start=1):
                loss = self.model.loss(*batch.to(self.runtime.device)) / tokens
                with self._sum.last_pass() if number == len(batches) else contextlib.nullcontext():
                    loss.backward()
                total += loss.detach()
            return float(total)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
