"""Laws and compute multipliers that benchmarks.scaling_laws fits to runs whose losses are known."""

import math
from pathlib import Path

import pytest

from benchmarks.scaling_laws import LawOptions, Run, describe, draw, fit, grids, interval, multipliers, read_runs
from nanochat.errors import UserError

BUDGETS = (1e12, 1e13, 1e14, 1e15)


def run(recipe: str, budget: float, depth: int, seed: int, loss: float, ratio: float) -> Run:
    return Run(recipe, budget, depth, seed, "text", 512, 65_536, int(ratio * 1e6), 1_000_000, loss)


def grid_runs(recipe: str, savings: float = 1.0, noise: float = 0.0) -> list[Run]:
    """Losses 1.2 + 40 (savings x C)^-0.15 at a ratio of 20, and worse on both sides of it."""
    return [
        run(
            recipe,
            budget,
            depth,
            seed,
            1.2 + 40 * (savings * budget) ** -0.15 + 0.02 * math.log(ratio / 20) ** 2 + noise * (-1) ** seed,
            ratio,
        )
        for budget in BUDGETS
        for depth, ratio in ((2, 60.0), (3, 18.0), (4, 7.0))
        for seed in (0, 1)
    ]


def test_the_law_and_the_best_ratio_are_recovered() -> None:
    by_recipe, sigma = grids(grid_runs("a"))
    law = fit(by_recipe["a"])
    assert sigma == pytest.approx(0, abs=1e-9)
    assert law.floor == pytest.approx(1.2, abs=0.02)
    assert law.exponent == pytest.approx(0.15, rel=0.03)
    assert law.loss(1e16) == pytest.approx(1.2 + 40 * 1e16**-0.15, rel=0.003)  # not used for the fit
    assert law.ratios == pytest.approx(dict.fromkeys(BUDGETS, 20.0), rel=0.01)


def test_the_largest_budget_is_predicted_from_the_others_and_drawn(tmp_path: Path) -> None:
    runs = grid_runs("a")
    assert "without 1e+15 FLOPs it predicts 1.42" in describe(runs, None)
    assert "predicts" not in describe([run for run in runs if run.budget <= BUDGETS[1]], None)
    draw(runs, tmp_path / "laws.png")
    assert (tmp_path / "laws.png").stat().st_size > 10_000


def test_a_recipe_that_needs_half_the_compute_has_a_multiplier_of_two() -> None:
    by_recipe, sigma = grids(grid_runs("before", noise=0.001) + grid_runs("after", savings=2, noise=0.001))
    assert sigma == pytest.approx(0.001 * math.sqrt(2))
    factors = multipliers(by_recipe["after"], by_recipe["before"])
    assert factors == pytest.approx(dict.fromkeys(BUDGETS, 2.0), rel=0.02)
    for budget, (low, high) in interval(by_recipe["after"], by_recipe["before"], sigma).items():
        assert low < factors[budget] < high
    one_seed = [run for run in grid_runs("before") + grid_runs("after", savings=2) if run.seed == 0]
    assert "| after | 1e+12 |" in describe(one_seed, "before")


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="against must be one of a, got b"):
        describe(grid_runs("a"), "b")
    with pytest.raises(UserError, match="--budgets must be at least"):
        LawOptions(budgets=(3.0,))
    file = tmp_path / "runs.jsonl"
    file.write_text('{"recipe": "a"}\n')
    with pytest.raises(UserError, match=r"runs\.jsonl"):
        read_runs(file)
