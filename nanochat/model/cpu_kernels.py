"""RMSNorm, rotary positions and the squared ReLU, with their gradients written out where autograd's are slow.

On a CPU torch puts F.rms_norm and what autograd makes of a rotation together from a dozen passes over memory; written
out they take three to six. What torch.compile sees, and a GPU, which compiles as a rule, have the plain expressions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_NORM_EPS = 1.1920929e-07


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension; there are no weights."""
    if _written_out(x):
        return _RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of each head by position, and norm it. (B, T, H, D) -> (B, H, T, D).

    cos, sin: (B or 1, T, 1, D / 2).
    """
    if _written_out(x):
        return _RMSNorm.apply(_Rotary.apply(x, cos, sin))
    first, second = x.chunk(2, dim=-1)
    return rms_norm(torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)).transpose(1, 2)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return _SquaredReLU.apply(x)


def _written_out(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """Forward and backward of (4, 512, 256) in bfloat16 on two AMX cores: 0.8 ms; by F.rms_norm 2.0 ms."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # as torch calls it
        dtype = torch.promote_types(x.dtype, torch.float32)
        root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).mul_(x.size(-1) ** -0.5)
        scale = root_mean_square.square_().add_(RMS_NORM_EPS).rsqrt_()
        normed = torch.mul(x, scale, out=torch.empty_like(x))  # of a scale in bfloat16 all of a row would be off
        ctx.save_for_backward(normed, scale.to(x.dtype))
        return normed

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        normed, scale = ctx.saved_tensors
        along = (grad_output * normed).sum(dim=-1, keepdim=True).mul_(-1 / normed.size(-1))
        return torch.addcmul(grad_output, normed, along).mul_(scale)


class _Rotary(torch.autograd.Function):
    """What comes out lies head by head, as attention in blocks wants it; the gradient token by token, as the matrices
    do."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]  # as torch calls it
        ctx.save_for_backward(cos, sin)
        batch, count, heads, size = x.shape
        rotated = x.new_empty(batch, heads, count, size)
        _rotate(x, cos, sin, out=rotated.transpose(1, 2))
        return rotated

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        cos, sin = ctx.saved_tensors
        grad = grad_output.transpose(1, 2)
        return _rotate(grad, cos, -sin, out=grad.new_empty(grad.shape)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=-1)
    return out


class _SquaredReLU(torch.autograd.Function):
    """The backward of autograd's pow took 18% of a CPU step at depth 4."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # as torch calls it
        rectified = F.relu(x)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        (rectified,) = ctx.saved_tensors
        return (grad_output * rectified).mul_(2)


QUERY_BLOCK = {torch.float32: 128, torch.bfloat16: 256}
"""Queries in a block: their scores stay in the processor's cache, and keys that they may not see cost little. Products
in bfloat16 are so fast that fewer and larger ones win."""
MOST_IN_BFLOAT16 = 512
"""Tokens of a row up to which blocks are faster in bfloat16."""

_HIDDEN = {dtype: torch.full((count, count), -torch.inf, dtype=dtype).triu(1) for dtype, count in QUERY_BLOCK.items()}
"""What hides from each query of a block the later ones."""


def in_blocks(count: int, device: torch.device, dtype: torch.dtype, *, training: bool) -> bool:
    """Whether `count` tokens at once are faster in blocks than by torch's scaled_dot_product_attention."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16:
        return training and count <= MOST_IN_BFLOAT16
    return dtype == torch.float32 and count > QUERY_BLOCK[dtype]


def blocked_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of each sequence's T newest of L tokens to themselves and to all before them.

    query: (B, H, T, D); keys, values: (B, H_kv, L, D) -> (B, H, T, D), all in fp32 or all in bfloat16.
    """
    if query.size(1) != keys.size(1):
        groups = query.size(1) // keys.size(1)
        keys, values = (shared.repeat_interleave(groups, dim=1) for shared in (keys, values))
    heads = (x.reshape(-1, *x.shape[2:]) for x in (query, keys, values))
    return _BlockedAttention.apply(*heads).view(query.shape)


def _blocks(count: int, length: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Of the newest `count` of `length` tokens, the queries of each block and the keys that some of them may see."""
    size = QUERY_BLOCK[dtype]
    ends = [(first, min(first + size, count)) for first in range(0, count, size)]
    return [(slice(first, last), slice(0, length - count + last)) for first, last in ends]


def kept_weights(longest: int, device: torch.device, dtype: torch.dtype) -> float:
    """Numbers that a head keeps of each token for the backward pass, besides query, key and value, in rows of up to
    `longest` tokens: the most, which is of the longest that go in blocks."""
    count = min(longest, MOST_IN_BFLOAT16) if dtype == torch.bfloat16 else longest
    if not in_blocks(count, device, dtype, training=True):
        return 0.0
    return sum((rows.stop - rows.start) * seen.stop for rows, seen in _blocks(count, count, dtype)) / count


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale x (a b) without a pass for the scale. baddbmm does not read what it would add to."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _BlockedAttention(torch.autograd.Function):
    """Of (N, T, D) to (N, L, D), where N counts the heads of all sequences."""

    @staticmethod
    def forward(ctx, query, keys, values):  # type: ignore[no-untyped-def]  # as torch calls it
        attended = torch.empty_like(query)
        scale, dtype = query.size(2) ** -0.5, query.dtype
        kept = []
        for rows, seen in _blocks(query.size(1), keys.size(1), dtype):
            scores = _product(query[:, rows], keys[:, seen].mT, scale)
            count = scores.size(1)
            scores[:, :, -count:] += _HIDDEN[dtype][:count, :count]
            weights = scores.softmax(dim=-1)
            attended[:, rows] = weights @ values[:, seen]
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(query, keys, values, *kept)
        return attended

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        query, keys, values, *kept = ctx.saved_tensors
        scale, dtype = query.size(2) ** -0.5, query.dtype
        query_grad, keys_grad, values_grad = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for (rows, seen), weights in zip(_blocks(query.size(1), keys.size(1), dtype), kept, strict=True):
            grad = grad_output[:, rows]
            values_grad[:, seen] += weights.mT @ grad
            slope = grad @ values[:, seen].mT
            scores_grad = torch.ops.aten._softmax_backward_data(slope, weights, -1, dtype)
            query_grad[:, rows] = _product(scores_grad, keys[:, seen], scale)
            keys_grad[:, seen] += _product(scores_grad.mT, query[:, rows], scale)
        return query_grad, keys_grad, values_grad
