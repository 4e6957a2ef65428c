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
