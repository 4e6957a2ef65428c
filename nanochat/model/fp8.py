"""Linear layers in FP8, forward and backward, with torch._scaled_mm.

Activations and weights are e4m3 (3 bits of mantissa), gradients e5m2 (2 bits, wider range), as in
https://arxiv.org/abs/2209.05433; sums are fp32. Scaling is dynamic and per tensor, as in the tensorwise recipe of
torchao.float8 (https://github.com/pytorch/ao), but by powers of two, so that scaling itself rounds nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLE = 16
"""torch._scaled_mm on CUDA requires the inner dimension and the width of the result to be multiples of this."""
MIN_AMAX = 1e-30
"""Lower bound for the largest absolute value of a tensor, so that zeros get a finite scale."""


class Scaled(NamedTuple):
    """A matrix in FP8: `values` times `scale`."""

    values: Tensor  # (M, K), row-major
    scale: Tensor  # a scalar in fp32

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> "Scaled":
        """Quantize x. Non-finite values in x make the scale or the values non-finite."""
        amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).clamp(min=MIN_AMAX)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / amax)))
        return cls((x * scale).to(dtype, memory_format=torch.contiguous_format), scale.reciprocal())

    def transposed(self) -> "Scaled":
        """The transpose, row-major. The scale is per tensor, so this does not round again."""
        return Scaled(self.values.t().contiguous(), self.scale)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, its gradients also in FP8. x: (..., in); weight: (out, in) in fp32 -> (..., out) in the dtype of x.

    in and out must be multiples of 16; the rows are padded with zeros to a multiple of 16.
    """
    rows = x.flatten(0, -2)
    missing = -rows.size(0) % MULTIPLE
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    return _Linear.apply(padded, weight)[: rows.size(0)].unflatten(0, x.shape[:-1])


def _product(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T. a: (M, K), b: (N, K) -> (M, N). Both are K-contiguous (TN), the only FP8 layout before Blackwell."""
    return torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale, out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]  # torch's signature
        x8, weight8 = Scaled.of(x, torch.float8_e4m3fn), Scaled.of(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, weight8, x.dtype)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        saved = ctx.saved_tensors
        x8, weight8 = Scaled(*saved[:2]), Scaled(*saved[2:])
        grad8 = Scaled.of(grad_output, torch.float8_e5m2)
        x_dtype, weight_dtype = ctx.dtypes
        return (
            _product(grad8, weight8.transposed(), x_dtype),
            _product(grad8.transposed(), x8.transposed(), weight_dtype),
        )
