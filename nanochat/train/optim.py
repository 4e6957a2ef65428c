"""Muon for the matrices inside the blocks and AdamW for embedding and head, as one optimizer.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to the
momentum, computed with the Polar Express polynomial (https://arxiv.org/abs/2505.16932).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.dist import World
from nanochat.model.gpt import GPT
from nanochat.train.sharding import CUT_INTO_ROWS, Shard, broadcast_weights, partition

Polynomial = Sequence[tuple[float, float, float]]

# Coefficients (a, b, c) of X <- a X + b (XX')X + c (XX')^2 X, from the paper, for singular values in [1e-3, 1]. All but
# the last are damped by its safety factor of 1.01, to keep rounding from pushing a singular value out of range.
_SAFETY = 1.01
POLAR_EXPRESS: Polynomial = (
    (8.28721201814563 / _SAFETY, -23.595886519098837 / _SAFETY**3, 17.300387312530933 / _SAFETY**5),
    (4.107059111542203 / _SAFETY, -2.9478499167379106 / _SAFETY**3, 0.5448431082926601 / _SAFETY**5),
    (3.9486908534822946 / _SAFETY, -2.908902115962949 / _SAFETY**3, 0.5518191394370137 / _SAFETY**5),
    (3.3184196573706015 / _SAFETY, -2.488488024314874 / _SAFETY**3, 0.51004894012372 / _SAFETY**5),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

ADAM_REFERENCE_WIDTH = 768  # at which the AdamW learning rates were tuned; they scale with (width / 768)^-0.5
MOMENTUM_WARMUP_STEPS = 300


@dataclass(frozen=True)
class OptimizerOptions:
    """Hyperparameters by group of parameters."""

    matrix_lr: float = 0.02  # Muon, matrices inside the blocks
    embedding_lr: float = 0.2  # AdamW, token embedding, before scaling with width
    unembedding_lr: float = 0.004  # AdamW, head, before scaling with width
    weight_decay: float = 0.0  # Muon; decoupled, multiplied by the learning rate
    momentum: float = 0.95  # Muon; warmed up from 0.85 over the first 300 steps
    adam_beta1: float = 0.8
    adam_beta2: float = 0.99
    adam_eps: float = 1e-10


def orthogonalize(matrices: Tensor, polynomial: Polynomial = POLAR_EXPRESS) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices: singular values above 1e-3 of the norm end within 0.13 of 1.

    matrices: (N, rows, columns), in the dtype to compute in; not modified.
    """
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in polynomial:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW over a GPT: one parameter group per matrix shape, one for the embedding, one for the head.

    Each group has `initial_lr`; a schedule sets `lr`. Each process keeps the state of its own shards
    (nanochat.train.sharding) and updates them; after a step all processes have the same weights, bit for bit.
    """

    polynomial = POLAR_EXPRESS

    def __init__(self, model: GPT, options: OptimizerOptions, world: World = World()) -> None:  # noqa: B008  # frozen
        self.world = world
        self.compute_dtype = model.compute_dtype
        self.shards = partition(model, world.size)
        self.own_shards = [shard for shard in self.shards if shard.owner == world.rank]
        self._own = {shard.parameter: shard for shard in self.own_shards}
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if name not in CUT_INTO_ROWS:
                by_shape[parameter.shape].append(parameter)
        muon = {"kind": "muon", "lr": options.matrix_lr, "momentum": options.momentum}
        groups: list[dict[str, Any]] = [
            {**muon, "params": parameters, "weight_decay": options.weight_decay} for parameters in by_shape.values()
        ]
        scale = (model.config.n_embd / ADAM_REFERENCE_WIDTH) ** -0.5
        adamw = {"kind": "adamw", "betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_eps}
        groups += [
            {**adamw, "params": [model.embed_tokens.weight], "lr": options.embedding_lr * scale},
            {**adamw, "params": [model.lm_head.weight], "lr": options.unembedding_lr * scale},
        ]
        super().__init__([{**group, "initial_lr": group["lr"], "step": 0} for group in groups], defaults={})
        for shard in self.own_shards:
            self.state[shard.parameter] = {name: torch.zeros_like(shard.weight) for name in self._state_names(shard)}

    def _state_names(self, shard: Shard) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if shard.name in CUT_INTO_ROWS else ("momentum",)

    @property
    def state_tensors(self) -> list[Tensor]:
        return [tensor for state in self.state.values() for tensor in state.values()]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update this process's shards from their gradients and send them to the other processes.

        Raises ValueError if a shard has no gradient.
        """
        for group in self.param_groups:
            group["step"] += 1
            shards = [self._own[parameter] for parameter in group["params"] if parameter in self._own]
            if not shards:
                continue
            if group["kind"] == "muon":
                self._muon(group, shards)
            else:
                self._adamw(group, shards[0])
        if self.world.size > 1:
            broadcast_weights(self.shards)

    def _muon(self, group: dict[str, Any], shards: list[Shard]) -> None:
        """Update all matrices of one shape as one batched product."""
        momentum = 0.85 + (group["momentum"] - 0.85) * min(group["step"] / MOMENTUM_WARMUP_STEPS, 1.0)
        gradients = [shard.gradient for shard in shards]
        buffers = [self.state[shard.parameter]["momentum"] for shard in shards]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov momentum
        directions = orthogonalize(torch.stack(updates).to(self.compute_dtype), self.polynomial).float().unbind()
        weights = [shard.weight for shard in shards]
        rows, columns = weights[0].shape
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-lr)

    def _adamw(self, group: dict[str, Any], shard: Shard) -> None:
        """AdamW without decay; eps is added to the bias-corrected root, as in the paper."""
        gradient, state = shard.gradient, self.state[shard.parameter]
        (beta1, beta2), step = group["betas"], group["step"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        shard.weight.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Raises RuntimeError with several processes, of which each has a part: use `full_state`."""
        if self.world.size > 1:
            raise RuntimeError("the state is sharded over processes: use full_state and load_full_state")
        return super().state_dict()

    def full_state(self) -> dict[str, Tensor]:
        """Gather the state of all processes as named tensors: <parameter>.momentum, .exp_avg, .exp_avg_sq, and `steps`.

        A collective: every process calls it; the main one gets the state, the others an empty dict. The result does
        not depend on the number of processes. With one process it is the state itself, not a copy; with more, it is in
        host memory.
        """
        steps = torch.tensor(self.param_groups[0]["step"])
        if self.world.size == 1:
            named = ((f"{s.name}.{kind}", self.state[s.parameter][kind]) for s, kind in self._named_state())
            return {**dict(named), "steps": steps}
        full: dict[str, Tensor] = {}
        for shard, kind in self._named_state():
            is_own = shard.owner == self.world.rank
            part = self.state[shard.parameter][kind] if is_own else torch.empty_like(shard.weight)
            dist.broadcast(part, shard.owner)
            if self.world.is_main:
                full.setdefault(f"{shard.name}.{kind}", torch.empty(shard.parameter.shape))[shard.rows] = part.cpu()
        return {**full, "steps": steps} if self.world.is_main else {}

    def load_full_state(self, full: dict[str, Tensor]) -> None:
        """Load what `full_state` returned. A collective; only the main process's argument counts.

        Raises ValueError if it is the state of a different model.
        """
        steps = 0
        if self.world.is_main:
            if set(full) != {*(f"{shard.name}.{kind}" for shard, kind in self._named_state()), "steps"}:
                raise ValueError("the optimizer state belongs to a different model")
            steps = int(full["steps"])
        for shard, kind in self._named_state():
            part = torch.empty_like(shard.weight)
            if self.world.is_main:
                part.copy_(full[f"{shard.name}.{kind}"][shard.rows])
            self.world.broadcast([part])
            if shard.owner == self.world.rank:
                self.state[shard.parameter][kind].copy_(part)
        steps = self.world.max(steps)
        for group in self.param_groups:
            group["step"] = steps

    def _named_state(self) -> list[tuple[Shard, str]]:
        return [(shard, kind) for shard in self.shards for kind in self._state_names(shard)]
