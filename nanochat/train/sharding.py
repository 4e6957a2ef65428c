"""Which process keeps the optimizer's state of which parameters, and what travels between them for it.

Every process holds all weights, but the optimizer's state is shared out (ZeRO, https://arxiv.org/abs/1910.02054): a
gradient is summed at the one process that owns it, which updates its weights and sends them to the others. That is as
many bytes as an all-reduce of the gradients, for it is an all-reduce with the update in its middle.

A matrix inside a block has one owner, for Muon needs all of it; embedding and head, whose elements AdamW treats one by
one, are cut into rows, so that each process gets the same share of them. No shape has to divide by the number of
processes. Nothing is put into buckets: the smallest matrix is (64 depth)^2 fp32, 6.5 MB at depth 20.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.dist import World

CUT_INTO_ROWS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Shard:
    """Rows of one parameter (of a matrix inside a block: all), and the process that owns them."""

    name: str
    """the parameter's"""
    parameter: nn.Parameter
    rows: slice
    owner: int

    @property
    def weight(self) -> Tensor:
        """(rows, columns), a view."""
        return self.parameter.detach()[self.rows]

    @property
    def gradient(self) -> Tensor:
        """(rows, columns), a view. Raises ValueError if there is none."""
        if self.parameter.grad is None:
            raise ValueError("a parameter has no gradient: the optimizer steps after a backward pass")
        return self.parameter.grad[self.rows]


def share_out(model: nn.Module, world_size: int) -> list[Shard]:
    """All parameters as shards, in about the order in which a backward pass completes their gradients.

    Matrices go, largest first, to whoever has the fewest elements so far; Muon's arithmetic is nearly proportional.
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


class GradientSum:
    """Sums gradients over processes, each shard's at its owner, while the backward pass still runs.

    With one process it does nothing.
    """

    def __init__(self, shards: Sequence[Shard], world: World) -> None:
        self.world = world
        self._shards: dict[nn.Parameter, list[Shard]] = defaultdict(list)
        for shard in shards:
            self._shards[shard.parameter].append(shard)
        # Each process begins the sums in this order, whatever the order in which its own gradients are complete:
        # collectives are matched by their order alone.
        self._waiting = deque(self._shards)
        self._complete: set[nn.Parameter] = set()
        self._works: list[dist.Work] = []
        self._is_last_pass = False
        if world.size > 1:
            for parameter in self._shards:
                parameter.register_post_accumulate_grad_hook(self._on_complete)

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Around the step's last backward pass: what it completes is sent off at once."""
        self._is_last_pass = True
        try:
            yield
        finally:
            self._is_last_pass = False

    def finish(self) -> None:
        """Send what is left, zeros where there was no gradient, and wait. Other processes' gradients are let go."""
        if self.world.size == 1:
            return
        while self._waiting:
            self._send_next()
        for work in self._works:
            work.wait()
        for parameter, shards in self._shards.items():
            if all(shard.owner != self.world.rank for shard in shards):
                parameter.grad = None
        self._waiting.extend(self._shards)
        self._complete.clear()
        self._works.clear()

    def _on_complete(self, parameter: nn.Parameter) -> None:
        if self._is_last_pass:
            self._complete.add(parameter)
            while self._waiting and self._waiting[0] in self._complete:
                self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        parameter = self._waiting.popleft()
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        for shard in self._shards[parameter]:
            work = dist.reduce(shard.gradient, shard.owner, async_op=True)
            assert work is not None  # as async_op has it
            self._works.append(work)


def clip_gradients(shards: Sequence[Shard], world: World, max_norm: float) -> float:
    """Scale the gradients, which are summed already, down to a global norm of `max_norm`; what it was before.

    Every process gives its own shards and gets the same answer. A norm that is not finite scales nothing.
    """
    gradients = [shard.gradient for shard in shards]
    square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if world.size > 1:
        dist.all_reduce(square)
    norm = float(square.sqrt())
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def send_weights(shards: Sequence[Shard]) -> None:
    """Give every process the owners' weights."""
    works = [dist.broadcast(shard.weight, shard.owner, async_op=True) for shard in shards]
    for work in works:
        assert work is not None  # as async_op has it
        work.wait()
