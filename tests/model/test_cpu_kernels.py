"""Gradients of the CPU kernels, compared with autograd of the plain expressions in fp64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.gpt import RMS_NORM_EPS, norm_and_rotate, rms_norm, squared_relu

ANGLES = torch.outer(torch.arange(5.0), torch.arange(1, 5) / 3)[None, :, None]


def turned(x: Tensor) -> Tensor:
    return norm_and_rotate(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)).transpose(1, 2)


def plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_NORM_EPS)


def plain_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = ANGLES.double().cos(), ANGLES.double().sin()
    return plain_norm(torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1))


PAIRS = [
    (rms_norm, plain_norm),
    (turned, plain_turned),
    (squared_relu, lambda x: F.relu(x).square()),
]


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_values_and_gradients(
    ours: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    tolerance: float,
    scale: float,
) -> None:
    torch.manual_seed(0)
    x = (scale * torch.randn(3, 5, 2, 8)).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    incoming = torch.randn(3, 5, 2, 8).to(dtype)
    got, want = ours(x), plain(x64)
    assert got.dtype == dtype
    assert (got.double() - want).norm() < tolerance * want.norm()
    (gradient,) = torch.autograd.grad(got, x, incoming)
    (exact,) = torch.autograd.grad(want, x64, incoming.double())
    assert (gradient.double() - exact).norm() < tolerance * exact.norm()


def test_the_norm_of_a_row_is_right_on_average_in_bfloat16() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 256).bfloat16()
    exact = plain_norm(x.double())
    gain = (rms_norm(x).double() * exact).mean(dim=1)
    assert (gain - 1).square().mean().sqrt() < 6e-4 and (gain - 1).abs().max() < 2.5e-3


def test_the_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x).sum().backward()
    assert rms_norm(x).abs().max() == 0 and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("outputs", [33, 48, 129, 300])
@pytest.mark.parametrize("rows", [1, 2, 44])
def test_products_with_a_transposed_matrix_of_any_width_are_right(rows: int, outputs: int) -> None:
    """oneDNN 3.12 zeroes some of the weights on aarch64; importing the kernels disables it there."""
    torch.manual_seed(0)
    x, weights = torch.randn(3, rows, 16), torch.randn(3, outputs, 16)
    torch.testing.assert_close((x @ weights.mT).double(), x.double() @ weights.double().mT, atol=1e-5, rtol=1e-5)
    linear = F.linear(x[0], weights[0])
    torch.testing.assert_close(linear.double(), F.linear(x[0].double(), weights[0].double()), atol=1e-5, rtol=1e-5)
