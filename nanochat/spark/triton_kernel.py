"""A hand-written Triton kernel, which lets the doctor distinguish faults of Triton from those of torch.compile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _double_kernel(source, target, size, block: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's language
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < size
    tl.store(target + offsets, 2 * tl.load(source + offsets, mask=inside), mask=inside)


def double(x: Tensor) -> Tensor:
    """Twice x, any shape, contiguous, on a GPU."""
    result = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, result, x.numel(), BLOCK)
    return result
