"""Muon for the matrices inside the blocks, AdamW for embedding and head, as one optimizer.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to the
momentum; the polynomial that finds it is Polar Express (https://arxiv.org/abs/2505.16932). Every process runs the
same code on the same summed gradients, so there is nothing to drift apart.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.gpt import GPT

# Coefficients (a, b, c) of X <- a X + b (XX')X + c (XX')^2 X: the paper's for singular values in [1e-3, 1]. All but
# the last are damped by its safety factor of 1.01, so that rounding cannot push a singular value out of range.
_SAFETY = 1.01
POLAR_EXPRESS = (
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
    adam_beta2: float = 0.95
    adam_eps: float = 1e-10


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each, about: singular values over 1e-3 of the norm land within 0.13 of 1.

    matrices: (N, rows, columns), in the dtype to compute in; not changed.
    """
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class MuonAdamW:
    """Both optimizers over all the parameters of a GPT."""

    def __init__(self, model: GPT, options: OptimizerOptions) -> None:
        self.options = options
        self.steps = 0
        """optimizer steps taken"""
        self.compute_dtype = model.compute_dtype
        self.matrices: dict[torch.Size, dict[str, nn.Parameter]] = defaultdict(dict)
        self.vectors: dict[str, tuple[nn.Parameter, float]] = {}
        scale = (model.config.n_embd / ADAM_REFERENCE_WIDTH) ** -0.5
        for name, parameter in model.named_parameters():
            if name.startswith("embed_tokens"):
                self.vectors[name] = (parameter, options.embedding_lr * scale)
            elif name.startswith("lm_head"):
                self.vectors[name] = (parameter, options.unembedding_lr * scale)
            else:
                self.matrices[parameter.shape][name] = parameter
        self.state: dict[str, Tensor] = {}
        for group in self.matrices.values():
            for name, parameter in group.items():
                self.state[f"{name}.momentum"] = torch.zeros_like(parameter)
        for name, (parameter, _) in self.vectors.items():
            self.state[f"{name}.exp_avg"] = torch.zeros_like(parameter)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One step with every learning rate times `lr_scale`; gradients are read, not cleared."""
        self.steps += 1
        for shape, group in self.matrices.items():
            self._muon(shape, group, lr_scale)
        for name, (parameter, lr) in self.vectors.items():
            self._adamw(name, parameter, lr * lr_scale)

    def _muon(self, shape: torch.Size, group: dict[str, nn.Parameter], lr_scale: float) -> None:
        """All matrices of one shape at once, as one batched product."""
        share = min(self.steps / MOMENTUM_WARMUP_STEPS, 1.0)
        momentum = 0.85 + (self.options.momentum - 0.85) * share
        gradients = [_gradient(parameter) for parameter in group.values()]
        buffers = [self.state[f"{name}.momentum"] for name in group]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's look ahead
        directions = orthogonalize(torch.stack(updates).to(self.compute_dtype)).float().unbind()
        lr = self.options.matrix_lr * lr_scale * max(1.0, shape[0] / shape[1]) ** 0.5
        parameters: list[Tensor] = list(group.values())
        if self.options.weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * self.options.weight_decay)
        torch._foreach_add_(parameters, directions, alpha=-lr)

    def _adamw(self, name: str, parameter: Tensor, lr: float) -> None:
        """AdamW without decay; eps stands beside the bias-corrected root, as in the paper."""
        gradient = _gradient(parameter)
        exp_avg, exp_avg_sq = self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]
        beta1, beta2 = self.options.adam_beta1, self.options.adam_beta2
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.lerp_(gradient.square(), 1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**self.steps)).sqrt_().add_(self.options.adam_eps)
        parameter.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**self.steps))

    def state_dict(self) -> dict[str, Tensor]:
        """All state as named tensors: <parameter>.momentum, .exp_avg, .exp_avg_sq, and `steps`."""
        return {**self.state, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError if it is another model's."""
        if set(state) != {*self.state, "steps"}:
            raise ValueError("the optimizer state belongs to another model")
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient: the optimizer steps after a backward pass")
    return parameter.grad
