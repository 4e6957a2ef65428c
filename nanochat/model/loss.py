"""Fused linear cross-entropy: head and loss without materializing all logits.

With a vocabulary of 32,768, the logits of a micro-batch of 32 x 2,048 tokens would take 8.6 GB in fp32, and on a CPU
they would fall out of the cache between elementwise passes. So the loss of a slice of rows is computed together with
its gradients: three matmuls per slice, as in autograd, and only the two gradients are kept for the backward pass.
Liger Kernel (https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy (https://arxiv.org/abs/2411.09009) do the same.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Exponentials = Callable[[Tensor, float, bool], tuple[Tensor, Tensor, Tensor]]

IGNORE = -1
"""Target of a position that is not trained on."""

SLICE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits per slice, computed in one matmul: 8 MB in bfloat16 on a CPU, 0.5 GB on a GPU. Smaller slices cost more,
since each adds one pass over the head's gradient."""
PIECE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits of a slice processed in fp32 at once: 1 MB on a CPU, to stay in a core's cache from pass to pass."""
PIECE_BUFFERS = 2
"""Number of fp32 tensors per piece that are alive at once when the elementwise passes are not fused."""


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

    hidden: (N, C) in the compute dtype; weight: (V, C); targets: (N,), may be IGNORE; token_weights: (N,) or None for
    ones. With a `softcap` other than 0, logits become softcap * tanh(logits / softcap) in fp32. `compiled`: fuse the
    elementwise passes with torch.compile, which is faster on a GPU and slower on a CPU.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, softcap, compiled)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, *, compiled: bool = False) -> Tensor:
    """Cross-entropy of each token in nats, (N,) in fp32, 0 for targets of IGNORE. No gradients."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    work = _Workspace(hidden, weight, softcap, compiled)
    for rows in work.slices():
        losses[rows] = work.losses(work.logits(hidden[rows]), targets[rows].clamp(min=0))[0]
    return losses.masked_fill_(targets == IGNORE, 0.0)


def workspace_bytes(count: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of logits held at once in the loss of `count` tokens."""
    rows = _rows_of(SLICE_ELEMENTS, count, vocab_size, device)
    piece_rows = _rows_of(PIECE_ELEMENTS, rows, vocab_size, device)
    return vocab_size * (rows * dtype.itemsize + piece_rows * PIECE_BUFFERS * 4)


def _rows_of(elements: dict[str, int], count: int, vocab_size: int, device: torch.device) -> int:
    """Number of rows, out of `count`, that stay within the element limit; at least 1."""
    return max(1, min(count, elements.get(device.type, elements["cuda"]) // vocab_size))


def _exponentials(raw: Tensor, softcap: float, wants_slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's maximum m and its sum of exp(logit - m), both (N, 1) in fp32, and (N, V) in the dtype of raw: with
    `wants_slopes` exp(logit - m) times the slope of the soft-cap, 1 - tanh^2, otherwise raw itself.

    raw: (N, V), the logits, divided by the soft-cap if there is one. Its memory is reused for the slopes, except in a
    compiled pass, which would then write them twice.
    """
    # Passes over the logits dominate, so there are as few as possible.
    if softcap == 0:
        maxima = raw.amax(dim=1, keepdim=True).float()
        exponential = raw.to(torch.float32, copy=True).sub_(maxima).exp_()
    else:  # in bfloat16 the tanh would lose precision
        capped = raw.to(torch.float32, copy=True).tanh_()
        maxima = softcap * capped.amax(dim=1, keepdim=True)
        exponential = (capped * softcap).sub_(maxima).exp_()
    sums = exponential.sum(dim=1, keepdim=True)
    if not wants_slopes:
        return maxima, sums, raw
    if softcap:
        exponential = torch.ops.aten.tanh_backward.grad_input(exponential, capped, grad_input=exponential)
    return maxima, sums, exponential.to(raw.dtype) if torch.compiler.is_compiling() else raw.copy_(exponential)


@functools.cache
def _compiled_exponentials() -> Exponentials:
    return torch.compile(_exponentials)


class _Workspace:
    """The head in the compute dtype, and one buffer of logits that all slices reuse: allocating 8 MB costs a CPU up
    to ten times as much as a pass over it."""

    def __init__(self, hidden: Tensor, weight: Tensor, softcap: float, compiled: bool) -> None:
        self.head = weight.to(hidden.dtype)
        self.softcap = softcap
        self.compiled = compiled
        self.count = hidden.size(0)
        vocab = weight.size(0)
        self.raw = hidden.new_empty(_rows_of(SLICE_ELEMENTS, self.count, vocab, hidden.device), vocab)
        self.piece_rows = _rows_of(PIECE_ELEMENTS, self.raw.size(0), vocab, hidden.device)

    def slices(self) -> Iterator[slice]:
        """Slices that cover all rows."""
        return _cut(self.count, self.raw.size(0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of one slice, divided by the soft-cap if there is one, in the compute dtype, in the shared buffer."""
        # addmm applies the factor without another pass; with beta=0 it does not read its first argument.
        factor = 1 / self.softcap if self.softcap else 1.0
        return torch.addmm(
            hidden.new_empty(()), hidden, self.head.T, beta=0, alpha=factor, out=self.raw[: hidden.size(0)]
        )

    def losses(self, raw: Tensor, targets: Tensor, *, wants_slopes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy (N,) of a slice's `logits`, and normalizers (N,), in fp32; targets: (N,). Overwrites `raw`.

        With `wants_slopes` the third result is d(cross-entropy) / d(logit before the cap) x normalizer, (N, V) in the
        dtype of raw.
        """
        targeted = torch.arange(raw.size(0), device=raw.device), targets
        target = raw[targeted].float()
        capped = target.tanh_() if self.softcap else None
        if capped is not None:
            target = self.softcap * capped
        if self.compiled:  # the whole buffer, also for a shorter last slice: one shape to compile
            found = _compiled_exponentials()(self.raw, self.softcap, wants_slopes)
            maxima, sums, slopes = (part[: len(raw)] for part in found)
        else:
            (maxima, sums), slopes = torch.empty(2, len(raw), 1, device=raw.device), raw
            for piece in _cut(len(raw), self.piece_rows):
                maxima[piece], sums[piece], _ = _exponentials(raw[piece], self.softcap, wants_slopes)
        maxima, sums = maxima.squeeze(1), sums.squeeze(1)
        if wants_slopes:  # (exp - sum x one_hot) x slope
            at_target = (target - maxima).exp_() - sums
            if capped is not None:
                at_target *= 1 - capped.square()
            slopes[targeted] = at_target.to(raw.dtype)  # scatter_ is 300 times slower on a CPU
        return maxima + sums.log() - target, sums, slopes


def _cut(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, softcap, compiled):  # type: ignore[no-untyped-def]  # torch's signature
        work = _Workspace(hidden, weight, softcap, compiled)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden if wants_gradient else hidden[:0])
        weight_grad = torch.zeros_like(weight if wants_gradient else weight[:0], dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in work.slices():
            logits = work.logits(hidden[rows])
            losses, normalizers, slopes = work.losses(logits, targets[rows].clamp(min=0), wants_slopes=wants_gradient)
            scale = (targets[rows] != IGNORE).float()
            if token_weights is not None:
                scale *= token_weights[rows]
            total += (losses * scale).sum()
            if not wants_gradient:
                continue
            # Per-row factors are applied on the C-wide side of the products, which is shorter than the vocabulary.
            row_scale = (scale / normalizers).unsqueeze(1)
            torch.mul(slopes @ work.head, row_scale, out=hidden_grad[rows])  # in fp32, then rounded
            scaled_hidden = torch.mul(hidden[rows], row_scale, out=torch.empty_like(hidden[rows]))
            if slopes.dtype == torch.float32:
                weight_grad.addmm_(slopes.T, scaled_hidden)
            elif slopes.is_cuda:  # the product itself adds to the sum, in fp32
                torch.addmm(weight_grad, slopes.T, scaled_hidden, out_dtype=torch.float32, out=weight_grad)
            else:
                weight_grad += slopes.T @ scaled_hidden
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            torch.mul(hidden_grad, grad_output.view(1, 1), out=torch.empty_like(hidden_grad)),  # in fp32: a view of 2-d
            (weight_grad * grad_output).to(ctx.weight_dtype),
            *4 * (None,),
        )
