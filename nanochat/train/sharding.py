"""Sharding of the optimizer state over processes, and its collectives.

Every process holds all weights, but only its share of the optimizer state (ZeRO-1, https://arxiv.org/abs/1910.02054):
a gradient is reduced to the process that owns it, which updates its weights and broadcasts them. That moves as many
bytes as an all-reduce of the gradients.

A matrix inside a block has one owner, since Muon needs all of it. Embedding and head, which AdamW updates element by
element, are split by rows, one range per process. No dimension has to be divisible by the number of processes.
Gradients are not bucketed: the smallest matrix is (64 x depth)^2 in fp32, 6.5 MB at depth 20.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.dist import World

CUT_INTO_ROWS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Shard:
    """Rows of one parameter (all rows of a matrix inside a block) and the rank that owns them."""

    name: str
    parameter: nn.Parameter
    rows: slice
    owner: int

    @property
    def weight(self) -> Tensor:
        """(rows, columns), a view."""
        return self.parameter.detach()[self.rows]

    @property
    def gradient(self) -> Tensor:
        """(rows, columns), a view. Raises ValueError without a gradient."""
        if self.parameter.grad is None:
            raise ValueError(f"{self.name} has no gradient: call backward before the optimizer's step")
        return self.parameter.grad[self.rows]


def partition(model: nn.Module, world_size: int) -> list[Shard]:
    """Cut all parameters into shards, roughly in the order in which a backward pass completes their gradients.

    Matrices are assigned largest first to the rank with the fewest elements so far: Muon's work is nearly proportional.
    """
    parameters = dict(model.named_parameters())
    whole = {name: parameter for name, parameter in parameters.items() if name not in CUT_INTO_ROWS}
    load = [0] * world_size
    owners = {}
    for name, parameter in sorted(whole.items(), key=lambda item: -item[1].numel()):
        owners[name] = load.index(min(load))
        load[owners[name]] += parameter.numel()
    shards = []
    for name, parameter in reversed(parameters.items()):
        if name in owners:
            shards.append(Shard(name, parameter, slice(0, parameter.size(0)), owners[name]))
        else:
            ends = [parameter.size(0) * rank // world_size for rank in range(world_size + 1)]
            shards += [Shard(name, parameter, slice(ends[rank], ends[rank + 1]), rank) for rank in range(world_size)]
    return shards


class GradientReducer:
    """Sums each shard's gradient over processes at its owner, overlapped with the backward pass.

    Does nothing with one process.
    """

    def __init__(self, shards: Sequence[Shard], world: World) -> None:
        self.world = world
        self._shards: dict[nn.Parameter, list[Shard]] = defaultdict(list)
        for shard in shards:
            self._shards[shard.parameter].append(shard)
        # Collectives are matched by order alone, so every process starts them in this order, regardless of the order
        # in which its own gradients become complete.
        self._pending = deque(self._shards)
        self._complete: set[nn.Parameter] = set()
        self._works: list[dist.Work] = []
        self.is_last_backward = False  # set in the last backward pass of a step: gradients are sent as they complete
        if world.size > 1:
            for parameter in self._shards:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def finish(self) -> None:
        """Send the remaining gradients (zeros if there are none) and wait. Frees gradients that others own."""
        self.is_last_backward = False
        if self.world.size == 1:
            return
        while self._pending:
            self._send_next()
        for work in self._works:
            work.wait()
        for parameter, shards in self._shards.items():
            if all(shard.owner != self.world.rank for shard in shards):
                parameter.grad = None
        self._pending.extend(self._shards)
        self._complete.clear()
        self._works.clear()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self.is_last_backward:
            self._complete.add(parameter)
            while self._pending and self._pending[0] in self._complete:
                self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        parameter = self._pending.popleft()
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        for shard in self._shards[parameter]:
            work = dist.reduce(shard.gradient, shard.owner, async_op=True)
            assert work is not None  # as async_op is set
            self._works.append(work)


def clip_gradients(shards: Sequence[Shard], world: World, max_norm: float) -> float:
    """Clip the reduced gradients to a global norm of `max_norm`; return the norm before clipping.

    Every process passes its own shards and gets the same result. If the norm is not finite, nothing is scaled.
    """
    gradients = [shard.gradient for shard in shards]
    square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if world.size > 1:
        dist.all_reduce(square)
    norm = float(square.sqrt())
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def broadcast_weights(shards: Sequence[Shard]) -> None:
    works = [dist.broadcast(shard.weight, shard.owner, async_op=True) for shard in shards]
    for work in works:
        assert work is not None  # as async_op is set
        work.wait()
