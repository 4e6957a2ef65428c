"""A linear layer for GPUs, whose weight gradient is in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. x: (..., in) in bfloat16; weight: (out, in) in fp32 -> (..., out) in bfloat16."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    """Autograd would round the weight's gradient to bfloat16 and copy it to fp32; the product gives it in fp32."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]  # torch's signature
        rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded)
        return F.linear(x, rounded)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        x, rounded = ctx.saved_tensors
        weight_grad = torch.mm(grad_output.flatten(0, -2).T, x.flatten(0, -2), out_dtype=torch.float32)
        return grad_output @ rounded, weight_grad
