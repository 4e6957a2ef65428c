"""A matrix product and its gradients in 8-bit floating point, with torch's own scaled product.

Activations and weights have 3 bits of mantissa (e4m3); gradients have 2, for a wider range (e5m2), as
https://arxiv.org/abs/2209.05433 proposes. Sums are fp32. Each tensor is scaled by one number, chosen each time from the
largest that it holds, as in the tensorwise recipe of https://github.com/pytorch/ao (torchao.float8). Here that number
is a power of two: then scaling rounds nothing, in bfloat16 neither, and a float is as precise at one scale as at any.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16
"""On CUDA, torch._scaled_mm wants what it sums over, and the width of its result, to be a multiple of this."""
LEAST_PEAK = 1e-30
"""Where a tensor's largest number is taken to be, if it is less: zeros have no scale of their own."""


class Scaled(NamedTuple):
    """A matrix in FP8: `numbers` times `unit`."""

    numbers: Tensor
    """(M, K), row by row in memory"""
    unit: Tensor
    """a scalar in fp32"""

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> "Scaled":
        """x rounded to an FP8 dtype. What is not finite in x makes the unit or the numbers NaN or infinite."""
        peak = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).clamp(min=LEAST_PEAK)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / peak)))
        return cls((x * scale).to(dtype, memory_format=torch.contiguous_format), scale.reciprocal())

    def transposed(self) -> "Scaled":
        """Its transpose, laid out anew. One unit for all of the matrix is what allows that without rounding again."""
        return Scaled(self.numbers.t().contiguous(), self.unit)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, its gradients also in FP8. x: (..., in); weight: (out, in) in fp32 -> (..., out) in the dtype of x.

    in and out are multiples of 16. Rows of zeros make up for a number of rows that is not.
    """
    rows = x.flatten(0, -2)
    missing = -rows.size(0) % MULTIPLE
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    return _Linear.apply(padded, weight)[: rows.size(0)].unflatten(0, x.shape[:-1])


def _product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T. a: (M, K), b: (N, K) -> (M, N). Both lie along K: before Blackwell, FP8 hardware knows no other layout."""
    return torch._scaled_mm(a.numbers, b.numbers.t(), a.unit, b.unit, out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]  # as torch calls it
        x8, weight8 = Scaled.of(x, torch.float8_e4m3fn), Scaled.of(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, weight8, x.dtype)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # as torch calls it
        saved = ctx.saved_tensors
        x8, weight8 = Scaled(*saved[:2]), Scaled(*saved[2:])
        grad8 = Scaled.of(grad_output, torch.float8_e5m2)
        x_dtype, weight_dtype = ctx.dtypes
        return (
            _product(grad8, weight8.transposed(), x_dtype),
            _product(grad8.transposed(), x8.transposed(), weight_dtype),
        )
