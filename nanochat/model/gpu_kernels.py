"""Linear layers for GPUs, whose weight gradients are in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T for each weight W. x: (..., in) in bfloat16; weights: (out, in) in fp32 -> (..., out) each in bfloat16."""
    return _Linears.apply(x, *weights)


@torch.library.custom_op("nanochat::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. A compiled `addmm_` would first copy the total."""
    torch.addmm(total, a, b, out=total)


class _Linears(torch.autograd.Function):
    """Autograd would round a weight's gradient to bfloat16 and copy it to fp32; the product gives it in fp32. The
    gradient of x is summed in the products."""

    @staticmethod
    def forward(ctx, x, *weights):  # type: ignore[no-untyped-def]  # torch's signature
        rounded = [weight.to(x.dtype) for weight in weights]
        ctx.save_for_backward(x, *rounded)
        return tuple(F.linear(x, weight) for weight in rounded)

    @staticmethod
    def backward(ctx, *grad_outputs):  # type: ignore[no-untyped-def]  # torch's signature
        x, *rounded = ctx.saved_tensors
        grads = [grad.flatten(0, -2) for grad in grad_outputs]
        x_grad = grads[0] @ rounded[0]
        for grad, weight in zip(grads[1:], rounded[1:], strict=True):
            _add_product(x_grad, grad, weight)
        rows = x.flatten(0, -2)
        return x_grad.view_as(x), *(torch.mm(grad.T, rows, out_dtype=torch.float32) for grad in grads)
