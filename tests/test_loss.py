"""The fused head and loss against the same computed plainly in fp64."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import loss
from nanochat.loss import IGNORE, linear_cross_entropy, token_losses

SOFTCAP = 15.0


def plain_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


@pytest.mark.parametrize(("slice_elements", "piece_elements"), [(1 << 22, 1 << 18), (700, 300)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_match_fp64(
    slice_elements: int, piece_elements: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.SLICE_ELEMENTS, "cpu", slice_elements)
    monkeypatch.setitem(loss.PIECE_ELEMENTS, "cpu", piece_elements)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, requires_grad=True)
    weight = (3 * torch.randn(100, 16)).requires_grad_()  # large, so that the soft-cap bends
    targets = torch.randint(100, (37,))
    targets[::5] = IGNORE
    weights = torch.randn(37) if weighted else None
    (2 * linear_cross_entropy(hidden, weight, targets, weights, SOFTCAP)).backward()

    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = plain_losses(hidden64, weight64, targets)
    expected = 2 * (losses if weights is None else losses * weights.double()).sum()
    expected.backward()
    for got, want in ((hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert got is not None and want is not None
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    value = linear_cross_entropy(hidden.detach(), weight.detach(), targets, weights, SOFTCAP)
    torch.testing.assert_close(2 * value.double(), expected.detach(), atol=1e-4, rtol=1e-5)


def test_token_losses_match_fp64() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(37, 16), torch.randn(100, 16), torch.randint(100, (37,))
    targets[3] = IGNORE
    expected = plain_losses(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(token_losses(hidden, weight, targets, SOFTCAP).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [4, 0])
def test_nothing_to_learn_gives_zero(count: int) -> None:
    hidden = torch.randn(count, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.full((count,), IGNORE), None, SOFTCAP)
    total.backward()
    assert total.item() == 0 and hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()
