"""Cross-entropy of a linear head, without ever holding all the logits.

At a vocabulary of 65,536 the logits of one micro-batch of 32 x 2,048 tokens would be 17 GB in fp32, and on a CPU
they fall out of the cache between each elementwise pass over them. So the head, the soft-cap and the cross-entropy
are computed for a slice of rows at a time, and the slice's gradients at once with it: three matmuls a slice, as
autograd would do, with nothing kept for the backward pass but the two gradients. The idea is that of Liger Kernel
(https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Exponentials = Callable[[Tensor, float, bool], Tensor]

IGNORE = -1
"""The target of a position that is not trained on."""

SLICE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits in one slice, whose rows multiply at once: 8 MB in bfloat16 on a CPU, 0.5 GB on a GPU. With fewer, adding up
the head's gradient costs more: it is passed over once a slice."""
PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits of a slice that are worked on in fp32 at once: 1 MB on a CPU, to stay near a core from pass to pass."""
PIECE_BUFFERS = 2
"""Tensors of a piece in fp32 that there are at once, where nothing fuses the passes over it."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    softcap: float,
    *,
    compiled: bool = False,
) -> Tensor:
    """Sum over tokens of token_weight x cross-entropy, a scalar in fp32.

    hidden: (N, C) in the compute dtype; weight: (V, C); targets: (N,), IGNORE where a position is not trained on;
    token_weights: (N,) or None for ones. Logits are capped softly, softcap * tanh(logits / softcap), in fp32.
    `compiled`: let torch.compile make one pass over the logits of the several; a GPU gains by it, a CPU loses.
    """
    exponentials = _compiled_exponentials() if compiled else _exponentials
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, softcap, exponentials)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross-entropy of each token in nats, (N,) in fp32, 0 where the target is IGNORE. No gradients."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    work = _Workspace(hidden, weight, softcap, _exponentials)
    for rows in work.slices():
        losses[rows], _ = work.losses(work.logits(hidden[rows]), targets[rows].clamp(min=0))
    return losses.masked_fill_(targets == IGNORE, 0.0)


def workspace_bytes(count: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that the logits of `count` tokens take, however many they are."""
    rows = _rows_of(SLICE_ELEMENTS, count, vocab_size, device)
    piece_rows = _rows_of(PIECE_ELEMENTS, rows, vocab_size, device)
    return vocab_size * (rows * dtype.itemsize + piece_rows * PIECE_BUFFERS * 4)


def _rows_of(elements: dict[str, int], count: int, vocab_size: int, device: torch.device) -> int:
    """Of `count` rows, those that have no more than so many elements; one at least."""
    return max(1, min(count, elements.get(device.type, elements["cuda"]) // vocab_size))


def _exponentials(raw: Tensor, softcap: float, leave_slopes: bool) -> Tensor:
    """The sums of exp(softcap * tanh(raw)) over each row, (N,) in fp32. raw: (N, V), logits over the soft-cap.

    With `leave_slopes`, raw becomes exp(softcap * tanh(raw)) x (1 - tanh(raw)^2).
    """
    # What takes time here is passing over the logits, so there are as few passes as can be. Logits are within the cap,
    # so exp needs no maximum taken off first: e^15 times any vocabulary is far inside fp32. In bfloat16 the tanh would
    # lose precision.
    capped = raw.float().tanh_()
    exponential = (capped * softcap).exp_()
    normalisers = exponential.sum(dim=1)
    if leave_slopes:
        raw.copy_(torch.ops.aten.tanh_backward.grad_input(exponential, capped, grad_input=exponential))
    return normalisers


@functools.cache
def _compiled_exponentials() -> Exponentials:
    return torch.compile(_exponentials)


class _Workspace:
    """The head in the compute dtype, and memory for one slice of logits that every slice is computed in: a fresh 8 MB
    from the system cost a CPU up to ten times what a pass over them does."""

    def __init__(self, hidden: Tensor, weight: Tensor, softcap: float, exponentials: Exponentials) -> None:
        self.head = weight.to(hidden.dtype)
        self.softcap = softcap
        self.exponentials = exponentials
        self.count = hidden.size(0)
        vocab = weight.size(0)
        self.raw = hidden.new_empty(_rows_of(SLICE_ELEMENTS, self.count, vocab, hidden.device), vocab)
        self.piece_rows = _rows_of(PIECE_ELEMENTS, self.raw.size(0), vocab, hidden.device)

    def slices(self) -> Iterator[slice]:
        """All rows, in slices."""
        return _cut(self.count, self.raw.size(0))

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of a slice over the soft-cap, in the compute dtype; the next slice's overwrite them."""
        # addmm for its factor, which costs no pass over the logits; what it would add to is not read.
        return torch.addmm(
            hidden.new_empty(()), hidden, self.head.T, beta=0, alpha=1 / self.softcap, out=self.raw[: hidden.size(0)]
        )

    def losses(self, raw: Tensor, targets: Tensor, *, leave_slopes: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy (N,) of a slice's `logits` and their normalisers (N,), in fp32; targets: (N,).

        With `leave_slopes` the logits become d(cross-entropy) / d(logit before the cap) x normaliser.
        """
        targeted = torch.arange(raw.size(0), device=raw.device), targets
        capped = raw[targeted].float().tanh_()
        normalisers = torch.empty_like(capped)
        for piece in _cut(raw.size(0), self.piece_rows):
            normalisers[piece] = self.exponentials(raw[piece], self.softcap, leave_slopes)
        if leave_slopes:  # (exp - normaliser x one_hot) x (1 - tanh^2)
            at_target = ((self.softcap * capped).exp_() - normalisers) * (1 - capped.square())
            raw[targeted] = at_target.to(raw.dtype)  # scatter_ takes a CPU 300 times as long
        return normalisers.log() - self.softcap * capped, normalisers


def _cut(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, softcap, exponentials):  # type: ignore[no-untyped-def]  # as torch calls it
        work = _Workspace(hidden, weight, softcap, exponentials)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden if wants_gradient else hidden[:0])
        weight_grad = torch.zeros_like(weight if wants_gradient else weight[:0], dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in work.slices():
            logits = work.logits(hidden[rows])
            losses, normalisers = work.losses(logits, targets[rows].clamp(min=0), leave_slopes=wants_gradient)
            scale = (targets[rows] != IGNORE).float()
            if token_weights is not None:
                scale *= token_weights[rows]
            total += (losses * scale).sum()
            if not wants_gradient:
                continue
            # What is the same for all of a row is multiplied in where rows are short, on the far side of the products.
            row_scale = (scale / normalisers).unsqueeze(1)
            hidden_grad[rows] = (logits @ work.head).mul_(row_scale)
            scaled_hidden = (hidden[rows] * row_scale).to(hidden.dtype)
            if logits.dtype == torch.float32:
                weight_grad.addmm_(logits.T, scaled_hidden)
            else:
                weight_grad += logits.T @ scaled_hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            (hidden_grad.float() * grad_output).to(hidden_grad.dtype),
            (weight_grad * grad_output).to(ctx.weight_dtype),
            *4 * (None,),
        )
