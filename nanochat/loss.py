"""Cross-entropy of a linear head, without ever holding all the logits.

At a vocabulary of 65,536 the logits of one micro-batch of 32 x 2,048 tokens would be 17 GB in fp32, and on a CPU
they fall out of the cache between each elementwise pass over them. So the head, the soft-cap and the cross-entropy
are computed for a slice of rows at a time, and the slice's gradients at once with it: three matmuls a slice, as
autograd would do, with nothing kept for the backward pass but the two gradients. The idea is that of Liger Kernel
(https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1
"""The target of a position that is not trained on."""

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Logits in one slice: 8 MB on a CPU, to stay in its last-level cache; 1 GB in fp32 on a GPU."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, softcap: float
) -> Tensor:
    """Sum over tokens of token_weight x cross-entropy, a scalar in fp32.

    hidden: (N, C) in the compute dtype; weight: (V, C); targets: (N,), IGNORE where a position is not trained on;
    token_weights: (N,) or None for ones. Logits are capped softly, softcap * tanh(logits / softcap), in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, softcap)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross-entropy of each token in nats, (N,) in fp32, 0 where the target is IGNORE. No gradients."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    head = weight.to(hidden.dtype)
    for rows in _slices(hidden, weight):
        logits = _tanh(hidden[rows], head, softcap).mul_(softcap)
        losses[rows] = F.cross_entropy(logits, targets[rows], ignore_index=IGNORE, reduction="none")
    return losses


def _slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    size = max(1, elements // weight.size(0))
    return [slice(start, start + size) for start in range(0, hidden.size(0), size)]


def _tanh(hidden: Tensor, head: Tensor, softcap: float) -> Tensor:
    """tanh(hidden @ head.T / softcap) in fp32: in bfloat16 the tanh would lose precision."""
    # addmm for its factor, which costs no pass over the logits; what it would add to is not read.
    scaled = torch.addmm(hidden.new_empty(()), hidden, head.T, beta=0, alpha=1 / softcap)
    return scaled.float().tanh_()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, softcap):  # type: ignore[no-untyped-def]  # as torch calls it
        head = weight.to(hidden.dtype)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden if wants_gradient else hidden[:0])
        weight_grad = torch.zeros_like(weight if wants_gradient else weight[:0], dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in _slices(hidden, weight):
            target = targets[rows]
            scale = (target != IGNORE).float()
            if token_weights is not None:
                scale *= token_weights[rows]
            target = target.clamp(min=0).unsqueeze(1)
            # What takes time here is passing over the logits, so there are as few passes as can be. Logits are within
            # the cap, so exp needs no maximum taken off first: e^15 times any vocabulary is far inside fp32.
            capped = _tanh(hidden[rows], head, softcap)
            exponential = (capped * softcap).exp_()
            normaliser = exponential.sum(dim=1, keepdim=True)
            losses = normaliser.log() - softcap * capped.gather(1, target)
            total += (losses.squeeze(1) * scale).sum()
            if not wants_gradient:
                continue
            # d(loss)/d(raw logit) = scale * (exp / normaliser - one_hot) * (1 - tanh^2). What is the same for all of a
            # row is multiplied in where rows are short, on this side and that of the two products.
            exponential.scatter_add_(1, target, -normaliser)
            slope = torch.ops.aten.tanh_backward.grad_input(exponential, capped, grad_input=exponential)
            grad = slope.to(hidden.dtype)
            row_scale = scale.unsqueeze(1) / normaliser
            hidden_grad[rows] = (grad @ head).mul_(row_scale)
            scaled_hidden = (hidden[rows] * row_scale).to(hidden.dtype)
            if grad.dtype == torch.float32:
                weight_grad.addmm_(grad.T, scaled_hidden)
            else:
                weight_grad += grad.T @ scaled_hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            hidden_grad * grad_output.to(hidden_grad.dtype),
            (weight_grad * grad_output).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
