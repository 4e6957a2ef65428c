"""Attention in blocks against torch's, values and gradients, in fp64."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import cpu_kernels
from nanochat.model.gpt import GPT, GPTConfig


@pytest.mark.parametrize("count", [129, 256, 300])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_values_and_gradients_are_torch_s(count: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, count, 16), (2, kv_heads, count, 16), (2, kv_heads, count, 16)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    incoming = torch.randn(shapes[0])
    got = cpu_kernels.blocked_attention(*inputs)
    got_gradients = torch.autograd.grad(got, inputs, incoming)

    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    query, keys, values = inputs64
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    expected_gradients = torch.autograd.grad(expected, inputs64, incoming.double())
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    for gradient, exact in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [48, 300])
def test_bfloat16_is_about_as_precise_as_torch_s(count: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, count, 64) for _ in range(3)]
    incoming = torch.randn(2, 4, count, 64)

    def outcome(attention: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        attended = attention(*leaves)
        return [attended.double(), *(x.double() for x in torch.autograd.grad(attended, leaves, incoming.to(dtype)))]

    torch_s = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    exact = outcome(torch_s, torch.float64)
    ours, theirs = (outcome(attention, torch.bfloat16) for attention in (cpu_kernels.blocked_attention, torch_s))
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).norm() < 2 * (peer - want).norm()


def test_the_newest_tokens_alone_attend_as_they_do_among_all() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 2, 400, 16) for _ in range(3))
    whole = cpu_kernels.blocked_attention(query, keys, values)
    newest = cpu_kernels.blocked_attention(query[:, :, 150:], keys, values)
    torch.testing.assert_close(newest, whole[:, :, 150:])


def test_the_model_trains_with_it_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, 512, 192))
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.randint(512, (2, 192))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.loss(tokens, tokens).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    assert cpu_kernels.use_blocked_attention(192, tokens.device, torch.float32, training=True)
    in_blocks = gradients()
    monkeypatch.setitem(cpu_kernels.QUERY_BLOCK, torch.float32, 192)  # longer rows only
    assert not cpu_kernels.use_blocked_attention(192, tokens.device, torch.float32, training=True)
    for gradient, expected in zip(in_blocks, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


def test_where_blocks_are_faster() -> None:
    cpu = torch.device("cpu")
    for dtype, training, counts in (
        (torch.float32, False, {128: False, 129: True, 4096: True}),
        (torch.float32, True, {128: False, 129: True, 4096: True}),
        (torch.bfloat16, False, {64: False, 512: False}),
        (torch.bfloat16, True, {1: True, 512: True, 513: False}),
    ):
        for count, expected in counts.items():
            assert cpu_kernels.use_blocked_attention(count, cpu, dtype, training=training) == expected
            assert not cpu_kernels.use_blocked_attention(count, torch.device("cuda"), dtype, training=training)
