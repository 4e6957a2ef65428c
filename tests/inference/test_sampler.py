"""Tokens are sampled from the requested distribution."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference.sampler import Sampler
from nanochat.inference.sampling_params import SamplingParams

NONE = torch.tensor([], dtype=torch.long)


def requests(samplings: list[SamplingParams]) -> list[Any]:
    return [SimpleNamespace(sampling=sampling, tokens=[], prompt_length=0) for sampling in samplings]


def draw(logits: torch.Tensor, samplings: list[SamplingParams]) -> list[int]:
    """One token each. logits: (N, V)."""
    sampler = Sampler(requests(samplings), logits.size(1), NONE)
    return sampler.sample(logits.clone(), [sampling.uniform(0) for sampling in samplings]).tolist()


@pytest.mark.parametrize("top_k", [None, 4])
def test_sampling_follows_the_distribution(top_k: int | None) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).repeat(20_000, 1)
    samplings = [SamplingParams(seed=seed, top_k=top_k) for seed in range(20_000)]
    counts = torch.bincount(torch.tensor(draw(logits, samplings)), minlength=4) / 20_000
    expected = logits[0].softmax(0)
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("wanted", "possible"),
    [
        (SamplingParams(temperature=0), {0}),
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_k=0), {0, 1, 2, 3}),
        (SamplingParams(top_k=3, top_p=0.5), {0, 1}),
        (SamplingParams(top_k=None, top_p=0.75), {0, 1, 2}),
        (SamplingParams(top_k=None, top_p=0.01), {0}),
        (SamplingParams(top_k=None, min_p=0.93), {0}),
        (SamplingParams(top_k=None, min_p=0.85), {0, 1}),
        (SamplingParams(top_k=3, min_p=0.01, temperature=50.0), {0, 1, 2}),
        (SamplingParams(top_k=1), {0}),
        (SamplingParams(top_k=2, temperature=1e-3), {0}),
        (SamplingParams(top_k=0, temperature=1e-40), {0}),
        (SamplingParams(top_k=3, temperature=1e-40), {0}),
        (SamplingParams(top_k=0, top_p=1e-46), {0}),
        (SamplingParams(top_k=0, min_p=1e-46), {0, 1, 2, 3}),
    ],
)
def test_each_request_has_its_own_candidates(wanted: SamplingParams, possible: set[int]) -> None:
    # probabilities of about 0.29, 0.26, 0.24, 0.21
    logits = torch.tensor([[3.0, 2.9, 2.8, 2.7]]).repeat(400, 1)
    others = [SamplingParams(temperature=0), SamplingParams(top_k=4, top_p=0.9), SamplingParams(top_k=None, min_p=0.1)]
    samplings = [dataclasses.replace(kind, seed=seed) for seed in range(100) for kind in (wanted, *others)]
    assert set(draw(logits, samplings)[0::4]) == possible


def test_logits_that_are_no_numbers_still_give_tokens_that_exist() -> None:
    kinds = [SamplingParams(top_k=None), SamplingParams(top_k=2), SamplingParams(top_k=None, top_p=0.5)]
    assert all(0 <= token < 4 for token in draw(torch.full((3, 4), torch.nan), kinds))


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 3
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=5, temperature=0.7),
        SamplingParams(top_k=None),
        SamplingParams(top_k=100, top_p=0.6),
        SamplingParams(top_k=None, min_p=0.05),
    ]
    samplings = [dataclasses.replace(kinds[seed % 5], seed=seed) for seed in range(40)]
    alone = [draw(logits[i : i + 1], samplings[i : i + 1])[0] for i in range(40)]
    assert draw(logits, samplings) == alone


def test_the_largest_uniform_selects_a_candidate() -> None:
    logits = torch.tensor([[1.0, 0.0, -100.0, -100.0]])
    for kind, last in (
        (SamplingParams(top_k=2), 1),
        (SamplingParams(top_k=None, min_p=0.1), 1),
        (SamplingParams(top_k=None, top_p=0.5), 0),
    ):
        tokens = Sampler(requests([kind]), 4, NONE).sample(logits.clone(), [1 - 2**-53])
        assert tokens.item() <= last


def test_uniform_draws_are_uniform_and_repeat() -> None:
    def draw_all(seeds: range, index: int) -> np.ndarray:
        return np.array([SamplingParams(seed=seed).uniform(index) for seed in seeds])

    draws = draw_all(range(10_000), 3)
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert (draws == draw_all(range(10_000), 3)).all()
    for seeds, index in ((range(10_000), 4), (range(1, 10_001), 2), (range(1, 10_001), 3)):
        assert abs(np.corrcoef(draws, draw_all(seeds, index))[0, 1]) < 0.04


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"top_k": -5},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 1e-40},
        {"stop": ("",)},
        {"logprobs": 21},
    ],
)
def test_sampling_params_out_of_range_are_rejected(wrong: dict) -> None:
    with pytest.raises(UserError, match="must be"):
        SamplingParams(**wrong)


def test_child_seeds_differ_and_child_0_is_unchanged() -> None:
    sampling = SamplingParams(seed=7)
    assert sampling.child(0) == sampling
    assert (
        len({sampling.child(i).seed for i in range(50)} | {SamplingParams(seed=8).child(i).seed for i in range(50)})
        == 100
    )
