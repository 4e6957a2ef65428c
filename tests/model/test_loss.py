"""The fused head and loss against the same computed plainly in fp64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from nanochat.model import loss
from nanochat.model.loss import IGNORE, linear_cross_entropy, token_losses

SOFTCAPS = [0.0, 15.0]


def plain_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


@pytest.mark.parametrize(("slice_elements", "piece_elements"), [(1 << 22, 1 << 18), (700, 300)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_loss_and_gradients_match_fp64(
    slice_elements: int, piece_elements: int, weighted: bool, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cpu", slice_elements)
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cpu", piece_elements)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, requires_grad=True)
    weight = (3 * torch.randn(100, 16)).requires_grad_()  # large, so that the soft-cap bends
    targets = torch.randint(100, (37,))
    targets[::5] = IGNORE
    weights = torch.randn(37) if weighted else None
    (2 * linear_cross_entropy(hidden, weight, targets, weights, softcap)).backward()

    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = plain_losses(hidden64, weight64, targets, softcap)
    expected = 2 * (losses if weights is None else losses * weights.double()).sum()
    expected.backward()
    for got, want in ((hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert got is not None and want is not None
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    value = linear_cross_entropy(hidden.detach(), weight.detach(), targets, weights, softcap)
    torch.testing.assert_close(2 * value.double(), expected.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("divisor", [3, 1000, 4096])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_gradients_in_bfloat16_are_right_on_average(
    divisor: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cpu", 20_000)  # several slices and pieces
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cpu", 7_000)
    torch.manual_seed(0)
    hidden = torch.randn(512, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 32).requires_grad_()
    targets = torch.randint(300, (512,))
    (linear_cross_entropy(hidden, weight, targets, None, softcap) / divisor).backward()
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().bfloat16().double().requires_grad_()
    (plain_losses(hidden64, weight64, targets, softcap).sum() / divisor).backward()
    for got, want in ((hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert got is not None and want is not None
        assert (got.double() - want).norm() < 1e-2 * want.norm()
        # The roundings of single numbers cancel out; one of 1 / divisor would not.
        assert ((got.double() * want).sum() / want.square().sum()).item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_compiled_it_is_the_same(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cpu", 2_000)
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cpu", 700)  # the last slice has fewer rows
    counted = CompileCounterWithBackend("aot_eager")  # needs no compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted, fullgraph=True))
    loss._compiled_exponentials.cache_clear()
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden = torch.randn(93, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(100, 16, requires_grad=True)
    targets = torch.randint(100, (93,))

    def outcome(compiled: bool) -> list[torch.Tensor]:
        value = linear_cross_entropy(hidden, weight, targets, None, softcap, compiled=compiled)
        losses = token_losses(hidden, weight, targets, softcap, compiled=compiled)
        return [losses, value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    for got, expected in zip(outcome(compiled=True), outcome(compiled=False), strict=True):
        torch.testing.assert_close(got, expected)
    assert counted.frame_count == 2  # with and without gradients, each for whole slices
    loss._compiled_exponentials.cache_clear()


@pytest.mark.parametrize("slice_elements", [1 << 22, 700])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_token_losses_match_fp64(slice_elements: int, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cpu", slice_elements)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(37, 16), torch.randn(100, 16), torch.randint(100, (37,))
    targets[3] = IGNORE
    expected = plain_losses(hidden.double(), weight.double(), targets, softcap)
    torch.testing.assert_close(token_losses(hidden, weight, targets, softcap).double(), expected, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = torch.randn(5, 16), 300 * torch.randn(100, 16), torch.randint(100, (5,))
    expected = plain_losses(hidden.double(), weight.double(), targets, 0)
    torch.testing.assert_close(token_losses(hidden, weight, targets, 0).double(), expected, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("count", [4, 0])
def test_nothing_to_learn_gives_zero(count: int) -> None:
    hidden = torch.randn(count, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.full((count,), IGNORE), None, 0)
    total.backward()
    assert total.item() == 0 and hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_what_a_cpu_does(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cuda", 1 << 19)  # two slices and a part of one, of several pieces
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cuda", 1 << 17)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(700, 64).bfloat16(), torch.randn(2048, 64), torch.randint(2048, (700,))
    outcomes = []
    for device in ("cpu", "cuda"):
        here, head = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
        on_gpu = device == "cuda"
        value = linear_cross_entropy(here, head, targets.to(device), None, 0, compiled=compiled and on_gpu)
        outcomes.append([value.detach(), *torch.autograd.grad(value, (here, head))])
    for expected, got in zip(*outcomes, strict=True):
        assert (got.cpu().double() - expected.double()).norm() < 1e-2 * expected.double().norm()
