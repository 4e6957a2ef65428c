"""Muon and AdamW do what their papers say."""

import pytest
import torch

from nanochat.train.optim import ADAM_REFERENCE_WIDTH, MuonAdamW, OptimizerOptions, orthogonalize
from tests.conftest import random_model


@pytest.mark.parametrize("shape", [(3, 32, 128), (3, 128, 32), (1, 64, 96)])
def test_orthogonalize_brings_singular_values_to_one_and_keeps_the_directions(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.87 and values.max() < 1.13
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ v)).flatten(1).sum(1) / result.flatten(1).norm(dim=1) / (u @ v).flatten(1).norm(dim=1)
    assert cosine.min() > 0.99


def test_adamw_steps_match_torch() -> None:
    model = random_model()
    options = OptimizerOptions(embedding_lr=0.01)
    optimizer = MuonAdamW(model, options)
    embedding = model.embed_tokens.weight
    reference = embedding.detach().clone().requires_grad_()
    peer = torch.optim.AdamW(
        [reference],
        lr=0.01 * (model.config.n_embd / ADAM_REFERENCE_WIDTH) ** -0.5,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=0.0,
    )
    tokens = torch.randint(512, (2, 16))
    for _ in range(3):
        model.zero_grad()
        model.loss(tokens, tokens).backward()
        assert embedding.grad is not None
        reference.grad = embedding.grad.clone()
        optimizer.step()
        peer.step()
    torch.testing.assert_close(embedding, reference, atol=1e-6, rtol=1e-5)


def test_every_parameter_moves() -> None:
    model = random_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonAdamW(model, OptimizerOptions())
    tokens = torch.randint(512, (4, 32))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_a_muon_step_has_the_size_of_its_learning_rate() -> None:
    model = random_model(sequence_len=256, depth=2)
    weight = model.get_parameter("layers.0.mlp.fc1.weight")  # (512, 128): scaled by sqrt(rows / columns)
    before = weight.detach().clone()
    tokens = torch.randint(512, (8, 128))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    MuonAdamW(model, OptimizerOptions(matrix_lr=0.01)).step()
    largest = torch.linalg.svdvals(weight.detach() - before).max().item()
    assert largest == pytest.approx(0.01 * 2, rel=0.15)


def test_state_round_trip_continues_the_same_way() -> None:
    def steps(model: torch.nn.Module, optimizer: MuonAdamW, seeds: range) -> None:
        for seed in seeds:
            tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(seed))
            model.zero_grad()
            model.loss(tokens, tokens).backward()  # type: ignore[operator]  # GPT.loss
            optimizer.step()

    straight, stopped = random_model(), random_model()
    optimizer = MuonAdamW(straight, OptimizerOptions())
    steps(straight, optimizer, range(4))
    first = MuonAdamW(stopped, OptimizerOptions())
    steps(stopped, first, range(2))
    second = MuonAdamW(stopped, OptimizerOptions())
    second.load_full_state(first.full_state())
    steps(stopped, second, range(2, 4))
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_gradients_is_a_programmers_error() -> None:
    with pytest.raises(ValueError, match="backward"):
        MuonAdamW(random_model(), OptimizerOptions()).step()


def test_state_of_another_model_is_refused() -> None:
    state = MuonAdamW(random_model(depth=1), OptimizerOptions()).full_state()
    with pytest.raises(ValueError, match="model"):
        MuonAdamW(random_model(depth=2), OptimizerOptions()).load_full_state(state)
