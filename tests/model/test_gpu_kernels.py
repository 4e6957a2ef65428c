"""Layers that run only on a GPU, against the same computed in fp64 on a CPU."""

import pytest
import torch

from nanochat.model.gpu_kernels import linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_linear_layer_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 48, 64).bfloat16(), torch.randn(80, 64), torch.randn(2, 48, 80).bfloat16()
    outcomes = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        here = x.to(device, dtype).requires_grad_()
        own = weight.bfloat16().to(device, torch.float64 if device == "cpu" else torch.float32).requires_grad_()
        y = here @ own.T if device == "cpu" else linear(here, own)
        outcomes.append([y.detach(), *torch.autograd.grad(y, (here, own), grad.to(device, dtype))])
    (y, x_grad, weight_grad), got = outcomes
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[0].cpu().double(), y, rtol=1e-2, atol=5e-2)
    torch.testing.assert_close(got[1].cpu().double(), x_grad, rtol=1e-2, atol=5e-2)
    torch.testing.assert_close(got[2].cpu().double(), weight_grad, rtol=1e-4, atol=1e-3)  # not rounded to bfloat16
