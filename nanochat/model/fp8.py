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
    def of(cls, x: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> "Scaled":
        """Quantize x. Non-finite values in x make the scale or the values non-finite.

        bound: a scalar that no absolute value in x exceeds; by default the largest, which takes a pass over x.
        """
        amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) if bound is None else bound
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / amax.clamp(min=MIN_AMAX))))
        return cls((x * scale).to(dtype, memory_format=torch.contiguous_format), scale.reciprocal())

    def transposed(self) -> "Scaled":
        """The transpose, row-major. The scale is per tensor, so this does not round again."""
        return Scaled(self.values.t().contiguous(), self.scale)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, its gradients also in FP8. x: (..., in); weight: (out, in) in fp32 -> (..., out) in the dtype of x.

    in and out must be multiples of 16; the rows are padded with zeros to a multiple of 16.
    """
    return _apply_to_rows(_Linear, x, weight)


def squared_relu_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """relu(x fc1^T)^2 fc2^T, its gradients also in FP8. x: (..., C); fc1: (M, C), fc2: (C, M) in fp32 -> (..., C).

    Sizes as in `linear`. Differs from two `linear` in the scale of the gradient inside, which needs no pass over it.
    """
    return _apply_to_rows(_SquaredReLUMLP, x, fc1, fc2)


def _apply_to_rows(function: type[torch.autograd.Function], x: Tensor, *weights: Tensor) -> Tensor:
    """Apply `function` to x as a matrix whose rows are padded."""
    rows = x.flatten(0, -2)
    missing = -rows.size(0) % MULTIPLE
    padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    y: Tensor = function.apply(padded, *weights)
    return y[: rows.size(0)].unflatten(0, x.shape[:-1])


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


class _SquaredReLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc1, fc2):  # type: ignore[no-untyped-def]  # torch's signature
        x8, fc1_8, fc2_8 = (Scaled.of(tensor, torch.float8_e4m3fn) for tensor in (x, fc1, fc2))
        hidden = _product(x8, fc1_8, x.dtype)
        active8 = Scaled.of(F.relu(hidden).square(), torch.float8_e4m3fn)
        ctx.save_for_backward(hidden, *x8, *fc1_8, *fc2_8, *active8)
        ctx.dtypes = x.dtype, fc1.dtype
        return _product(active8, fc2_8, x.dtype)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]  # torch's signature
        hidden, *saved = ctx.saved_tensors
        x8, fc1_8, fc2_8, active8 = (Scaled(*saved[i : i + 2]) for i in range(0, 8, 2))
        x_dtype, weight_dtype = ctx.dtypes
        longest = torch.linalg.vector_norm(grad_output, dim=1, dtype=torch.float32).amax()
        grad8 = Scaled.of(grad_output, torch.float8_e5m2, bound=longest)
        grad_active = _product(grad8, fc2_8.transposed(), x_dtype)
        # d relu(h)^2 = 2 relu(h) dh. relu(h) is at most the root of the largest number of active8, an element of
        # grad_active at most the product of its row's and column's lengths (Cauchy-Schwarz); 2 more for rounding. A
        # bound that is 1,000 times too large costs nothing: the normal numbers of e5m2 span 2^30.
        column = torch.linalg.vector_norm(fc2_8.values.float() * fc2_8.scale, dim=0).amax()
        relu_bound = (torch.finfo(torch.float8_e4m3fn).max * active8.scale).sqrt()
        hidden_grad8 = Scaled.of(
            2 * F.relu(hidden) * grad_active, torch.float8_e5m2, bound=4 * relu_bound * longest * column
        )
        return (
            _product(hidden_grad8, fc1_8.transposed(), x_dtype),
            _product(hidden_grad8.transposed(), x8.transposed(), weight_dtype),
            _product(grad8.transposed(), active8.transposed(), weight_dtype),
        )
