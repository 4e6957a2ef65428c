"""Muon for the matrices inside the blocks, AdamW for embedding and head, as one optimizer.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to the
momentum; the polynomial that finds it is Polar Express (https://arxiv.org/abs/2505.16932). One process and many run
the same code, each on the shards that are its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.dist import World
from nanochat.model.gpt import GPT
from nanochat.train.sharding import Shard, send_weights, share_out

Polynomial = Sequence[tuple[float, float, float]]

# Coefficients (a, b, c) of X <- a X + b (XX')X + c (XX')^2 X: the paper's for singular values in [1e-3, 1]. All but
# the last are damped by its safety factor of 1.01, so that rounding cannot push a singular value out of range.
_SAFETY = 1.01
POLAR_EXPRESS: Polynomial = (
    (8.28721201814563 / _SAFETY, -23.595886519098837 / _SAFETY**3, 17.300387312530933 / _SAFETY**5),
    (4.107059111542203 / _SAFETY, -2.9478499167379106 / _SAFETY**3, 0.5448431082926601 / _SAFETY**5),
    (3.9486908534822946 / _SAFETY, -2.908902115962949 / _SAFETY**3, 0.5518191394370137 / _SAFETY**5),
    (3.3184196573706015 / _SAFETY, -2.488488024314874 / _SAFETY**3, 0.51004894012372 / _SAFETY**5),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

ADAM_REFERENCE_WIDTH = 768
"""The width at which the AdamW learning rates were tuned; others scale with (width / 768)^-0.5."""

MOMENTUM_WARMUP_STEPS = 300


@dataclass(frozen=True)
class OptimizerOptions:
    """Learning rates and the rest, by group of parameters."""

    matrix_lr: float = 0.02
    """Muon, the matrices inside the blocks"""
    embedding_lr: float = 0.2
    """AdamW, token embedding, before scaling with width"""
    unembedding_lr: float = 0.004
    """AdamW, head, before scaling with width"""
    weight_decay: float = 0.0
    """of the matrices, decoupled, times the learning rate"""
    momentum: float = 0.95
    """Muon's, reached from 0.85 over the first 300 steps"""
    adam_beta1: float = 0.8
    adam_beta2: float = 0.99
    adam_eps: float = 1e-10


def orthogonalize(matrices: Tensor, polynomial: Polynomial = POLAR_EXPRESS) -> Tensor:
    """The nearest semi-orthogonal matrix of each, about: singular values over 1e-3 of the norm land within 0.13 of 1.

    matrices: (N, rows, columns), in the dtype to compute in; not changed.
    """
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in polynomial:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class MuonAdamW:
    """Muon and AdamW over a GPT. Each process keeps and updates its own shards (nanochat.train.sharding)."""

    polynomial = POLAR_EXPRESS

    def __init__(self, model: GPT, options: OptimizerOptions, world: World = World()) -> None:  # noqa: B008  # frozen
        self.options = options
        self.world = world
        self.steps = 0
        """optimizer steps taken"""
        self.compute_dtype = model.compute_dtype
        self.shards = share_out(model, world.size)
        """of all processes"""
        self.own_shards = [shard for shard in self.shards if shard.owner == world.rank]
        self._adamw_lr = self.adamw_lr(model)
        self._matrices: dict[torch.Size, list[Shard]] = defaultdict(list)
        for shard in self.own_shards:
            if shard.parameter not in self._adamw_lr:
                self._matrices[shard.weight.shape].append(shard)
        self.state = {
            f"{shard.name}.{kind}": torch.zeros_like(shard.weight)
            for shard in self.own_shards
            for kind in self._kinds(shard)
        }
        """this process's part"""

    def adamw_lr(self, model: GPT) -> dict[Tensor, float]:
        """The parameters that AdamW steps, with their learning rates; all others are matrices for Muon."""
        scale = (model.config.n_embd / ADAM_REFERENCE_WIDTH) ** -0.5
        return {
            model.embed_tokens.weight: self.options.embedding_lr * scale,
            model.lm_head.weight: self.options.unembedding_lr * scale,
        }

    def _kinds(self, shard: Shard) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if shard.parameter in self._adamw_lr else ("momentum",)

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One step with every learning rate times `lr_scale`; gradients of the own shards are read, not cleared.

        Afterwards all processes have the same weights, bit for bit.
        """
        self.steps += 1
        for shape, shards in self._matrices.items():
            self._muon(shape, shards, lr_scale)
        for shard in self.own_shards:
            if shard.parameter in self._adamw_lr:
                self._adamw(shard, self._adamw_lr[shard.parameter] * lr_scale)
        if self.world.size > 1:
            send_weights(self.shards)

    def _muon(self, shape: torch.Size, shards: list[Shard], lr_scale: float) -> None:
        """All matrices of one shape at once, as one batched product."""
        progress = min(self.steps / MOMENTUM_WARMUP_STEPS, 1.0)
        momentum = 0.85 + (self.options.momentum - 0.85) * progress
        gradients = [shard.gradient for shard in shards]
        buffers = [self.state[f"{shard.name}.momentum"] for shard in shards]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's look ahead
        directions = orthogonalize(torch.stack(updates).to(self.compute_dtype), self.polynomial).float().unbind()
        lr = self.options.matrix_lr * lr_scale * max(1.0, shape[0] / shape[1]) ** 0.5
        weights = [shard.weight for shard in shards]
        if self.options.weight_decay:
            torch._foreach_mul_(weights, 1 - lr * self.options.weight_decay)
        torch._foreach_add_(weights, directions, alpha=-lr)

    def _adamw(self, shard: Shard, lr: float) -> None:
        """AdamW without decay; eps stands beside the bias-corrected root, as in the paper."""
        gradient = shard.gradient
        exp_avg, exp_avg_sq = self.state[f"{shard.name}.exp_avg"], self.state[f"{shard.name}.exp_avg_sq"]
        beta1, beta2 = self.options.adam_beta1, self.options.adam_beta2
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.lerp_(gradient.square(), 1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**self.steps)).sqrt_().add_(self.options.adam_eps)
        shard.weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**self.steps))

    def state_dict(self) -> dict[str, Tensor]:
        """The state of all processes as named tensors: <parameter>.momentum, .exp_avg, .exp_avg_sq, and `steps`.

        Every process has to call it. The main one gets the state, the same whatever the number of processes; the others
        get nothing. What one process alone gets is the state itself and not a copy; else it is in host memory.
        """
        if self.world.size == 1:
            return {**self.state, "steps": torch.tensor(self.steps)}
        full: dict[str, Tensor] = {}
        for shard in self.shards:
            for kind in self._kinds(shard):
                name = f"{shard.name}.{kind}"
                part = self.state[name] if shard.owner == self.world.rank else torch.empty_like(shard.weight)
                dist.broadcast(part, shard.owner)
                if self.world.rank == 0:
                    full.setdefault(name, torch.empty(shard.parameter.shape))[shard.rows] = part.cpu()
        return {**full, "steps": torch.tensor(self.steps)} if self.world.rank == 0 else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Every process has to call it; what the main one gives counts.

        Raises ValueError if it is another model's.
        """
        if self.world.rank == 0:
            names = {f"{shard.name}.{kind}" for shard in self.shards for kind in self._kinds(shard)}
            if set(state) != {*names, "steps"}:
                raise ValueError("the optimizer state belongs to another model")
            self.steps = int(state["steps"])
        for shard in self.shards:
            for kind in self._kinds(shard):
                name = f"{shard.name}.{kind}"
                part = torch.empty_like(shard.weight)
                if self.world.rank == 0:
                    part.copy_(state[name][shard.rows])
                if self.world.size > 1:
                    dist.broadcast(part, 0)
                if shard.owner == self.world.rank:
                    self.state[name].copy_(part)
        if self.world.size > 1:
            steps = torch.tensor(self.steps, device=self.shards[0].weight.device)
            dist.broadcast(steps, 0)
            self.steps = int(steps)
