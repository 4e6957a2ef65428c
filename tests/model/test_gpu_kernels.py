"""Layers that run only on a GPU, against the same computed in fp64 on a CPU."""

import pytest
import torch

from nanochat.model.gpu_kernels import linears


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_linear_layers_and_their_gradients(compiled: bool) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 48, 64).bfloat16(), torch.randn(2, 48, 112).bfloat16()
    weights = [torch.randn(80, 64).bfloat16(), torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16()]
    function = torch.compile(linears) if compiled else linears
    outcomes = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        here = x.to(device, dtype).requires_grad_()
        own = [w.to(device, torch.float64 if device == "cpu" else torch.float32).requires_grad_() for w in weights]
        outputs = [here @ w.T for w in own] if device == "cpu" else function(here, *own)
        y = torch.cat(outputs, dim=-1)
        outcomes.append([y.detach(), *torch.autograd.grad(y, (here, *own), grad.to(device, dtype))])
    expected, got = outcomes
    assert [tensor.dtype for tensor in got] == 2 * [torch.bfloat16] + 3 * [torch.float32]
    for index, (result, exact) in enumerate(zip(got, expected, strict=True)):
        rtol, atol = (1e-2, 5e-2) if index < 2 else (1e-4, 1e-3)  # weight gradients are not rounded to bfloat16
        torch.testing.assert_close(result.cpu().double(), exact, rtol=rtol, atol=atol)
