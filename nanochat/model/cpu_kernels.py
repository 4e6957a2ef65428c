"""Faster RMSNorm, rotary positions, squared ReLU and causal attention for CPUs, with hand-written gradients.

On a CPU, F.rms_norm and autograd's backward pass of a rotation take a dozen passes over memory; written by hand, they
take three to six. nanochat.model.gpt has the plain expressions, which GPUs and torch.compile use.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

if platform.machine() == "aarch64":
    # With SVE, oneDNN 3.12 (torch 2.13) packs a transposed matrix wrongly if 1 to 16 of its last 32 columns are used:
    # it clears eight rows of them. Without oneDNN, torch multiplies with its BLAS library.
    torch.backends.mkldnn.set_flags(_enabled=False)

QUERY_BLOCK = {torch.float32: 128, torch.bfloat16: 256}
"""Queries per attention block: few enough that their scores stay in the cache and little of the work is masked.
bfloat16 products are so fast that fewer, larger ones win."""
MAX_BFLOAT16_ROW = 512  # row length up to which blocked attention is faster than torch's in bfloat16

_MASK = {dtype: torch.full((size, size), -torch.inf, dtype=dtype).triu(1) for dtype, size in QUERY_BLOCK.items()}


def enabled(x: Tensor) -> bool:
    """True if these kernels are faster than the plain expressions: on a CPU, unless torch.compile fuses those."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square along the last dimension."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, eps)
    return torch.mul(x, _inverse_rms(x, eps), out=torch.empty_like(x))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # In fp32 or wider: rounding to bfloat16 would change the scale of a whole row by up to 0.4%.
    dtype = torch.promote_types(x.dtype, torch.float32)
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).mul_(x.size(-1) ** -0.5)
    return rms.square_().add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """Forward and backward of (4, 512, 256) in bfloat16 on two AMX cores: 0.8 ms; with F.rms_norm, 2.0 ms."""

    @staticmethod
    def forward(ctx, x, eps):  # type: ignore[no-untyped-def]  # torch's signature
        scale = _inverse_rms(x, eps)
        normed = torch.mul(x, scale, out=torch.empty_like(x))
        ctx.save_for_backward(normed, scale.to(x.dtype))
        return normed

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        normed, scale = ctx.saved_tensors
        along = (grad_output * normed).sum(dim=-1, keepdim=True).mul_(-1 / normed.size(-1))
        return torch.addcmul(grad_output, normed, along).mul_(scale), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions. x: (B, T, H, D); cos, sin: (1 or B, T, 1, D / 2) -> (B, H, T, D), contiguous."""
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """The output is laid out head by head, as blocked attention reads it; the gradient token by token, as the matrix
    products do."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]  # torch's signature
        ctx.save_for_backward(cos, sin)
        batch, length, heads, size = x.shape
        rotated = x.new_empty(batch, heads, length, size)
        _rotate(x, cos, sin, out=rotated.transpose(1, 2))
        return rotated

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        cos, sin = ctx.saved_tensors
        grad = grad_output.transpose(1, 2)
        return _rotate(grad, cos, -sin, out=grad.new_empty(grad.shape)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=-1)
    return out


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _SquaredReLU.apply(x)
    rectified = F.relu(x)
    return rectified.mul_(rectified)


class _SquaredReLU(torch.autograd.Function):
    """The backward of autograd's pow took 18% of a CPU step at depth 4."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # torch's signature
        rectified = F.relu(x)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        (rectified,) = ctx.saved_tensors
        return (grad_output * rectified).mul_(2)


def use_blocked_attention(length: int, device: torch.device, dtype: torch.dtype, *, training: bool) -> bool:
    """True if `blocked_attention` of `length` new tokens is faster than torch's scaled_dot_product_attention."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16:
        return training and length <= MAX_BFLOAT16_ROW
    return dtype == torch.float32 and length > QUERY_BLOCK[dtype]


def blocked_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the T newest of L tokens, by matrix products over blocks of queries.

    torch's kernel computes all scores and masks half of them; this skips most of that half. At depth 4, with rows of
    512 tokens, a training step spends a third less time on attention.

    query: (B, H, T, D); keys, values: (B, H_kv, L, D) -> (B, H, T, D), all in fp32 or all in bfloat16.
    """
    if query.size(1) != keys.size(1):
        groups = query.size(1) // keys.size(1)
        keys, values = (shared.repeat_interleave(groups, dim=1) for shared in (keys, values))
    heads = (x.reshape(-1, *x.shape[2:]) for x in (query, keys, values))
    return _BlockedAttention.apply(*heads).view(query.shape)


def _blocks(count: int, length: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Slices of the newest `count` of `length` tokens, each with the slice of keys that it attends to."""
    size = QUERY_BLOCK[dtype]
    ends = [(start, min(start + size, count)) for start in range(0, count, size)]
    return [(slice(start, end), slice(0, length - count + end)) for start, end in ends]


def saved_attention_weights(row_len: int, device: torch.device, dtype: torch.dtype) -> float:
    """Attention weights per head and token that blocked attention keeps for the backward pass, for rows of up to
    `row_len` tokens."""
    longest = min(row_len, MAX_BFLOAT16_ROW) if dtype == torch.bfloat16 else row_len
    if not use_blocked_attention(longest, device, dtype, training=True):
        return 0.0
    return sum((rows.stop - rows.start) * keys.stop for rows, keys in _blocks(longest, longest, dtype)) / longest


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    # baddbmm applies the scale without another pass; with beta=0 it does not read its first argument.
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _BlockedAttention(torch.autograd.Function):
    """query: (N, T, D); keys, values: (N, L, D), where N counts the heads of all sequences."""

    @staticmethod
    def forward(ctx, query, keys, values):  # type: ignore[no-untyped-def]  # torch's signature
        output = torch.empty_like(query)
        scale, dtype = query.size(2) ** -0.5, query.dtype
        saved = []
        for rows, seen in _blocks(query.size(1), keys.size(1), dtype):
            scores = _scaled_product(query[:, rows], keys[:, seen].mT, scale)
            count = scores.size(1)
            scores[:, :, -count:] += _MASK[dtype][:count, :count]
            weights = scores.softmax(dim=-1)
            output[:, rows] = weights @ values[:, seen]
            if any(ctx.needs_input_grad):
                saved.append(weights)
        ctx.save_for_backward(query, keys, values, *saved)
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        query, keys, values, *saved = ctx.saved_tensors
        scale, dtype = query.size(2) ** -0.5, query.dtype
        query_grad, keys_grad, values_grad = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for (rows, seen), weights in zip(_blocks(query.size(1), keys.size(1), dtype), saved, strict=True):
            grad = grad_output[:, rows]
            values_grad[:, seen] += weights.mT @ grad
            weights_grad = grad @ values[:, seen].mT
            scores_grad = torch.ops.aten._softmax_backward_data(weights_grad, weights, -1, dtype)
            query_grad[:, rows] = _scaled_product(scores_grad, keys[:, seen], scale)
            keys_grad[:, seen] += _scaled_product(scores_grad.mT, query[:, rows], scale)
        return query_grad, keys_grad, values_grad
