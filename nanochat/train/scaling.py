"""Scaling rules: batch size, number of steps and learning rates from depth and training length."""

import math
from dataclasses import replace

from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime, fast_rows
from nanochat.train.options import PretrainOptions, TrainOptions

REFERENCE_TOKENS, REFERENCE_BATCH, REFERENCE_STEPS, MIN_BATCH = 11.2e9, 524_288, 24_000, 2048


def scale_options(
    options: PretrainOptions, config: GPTConfig, runtime: Runtime, tokens_per_epoch: int = 0
) -> PretrainOptions:
    """Fill in the options that were not given: tokens follow from the parameters, the batch size from the tokens."""
    tokens = options.target_param_data_ratio * config.num_multiplied
    if options.num_epochs:
        tokens = options.num_epochs * tokens_per_epoch
    batch = options.total_batch_size or default_batch_size(tokens, config.sequence_len * runtime.world.size)
    rows = options.device_batch_size or fast_rows(config.sequence_len, runtime.device, runtime.compute_dtype)
    return replace(
        options,
        total_batch_size=batch,
        device_batch_size=rows,
        num_iterations=options.num_iterations or max(1, round(tokens / batch)),
    )


def default_batch_size(tokens: float, unit: int) -> int:
    """Tokens per step for training on `tokens` tokens: a power of two, rounded to a multiple of `unit`.

    A power law through two points: 4,096, measured to be better than 8,192 at 6.6 million tokens (docs/experiments.md),
    and nanochat's 524,288 at 11.2 billion. https://arxiv.org/abs/2505.13738 finds an exponent of 0.38 among larger
    models alone.
    """
    ideal = max(MIN_BATCH, REFERENCE_BATCH * (tokens / REFERENCE_TOKENS) ** 0.65)
    return max(1, round(2 ** round(math.log2(ideal)) / unit)) * unit


def matrix_lr_factor(batch: int, num_iterations: int) -> float:
    """Factor on Muon's learning rate, at most 1, for `num_iterations` steps of `batch` tokens.

    The best rate rises with the batch and falls with the steps. Fitted to runs of 400 to 1,600 steps of 2,048 and 4,096
    tokens (docs/experiments.md), and to nanochat's rate at 20,000 steps of 524,288.
    """
    return min(1.0, (batch / REFERENCE_BATCH) ** (1 / 3) * (num_iterations / REFERENCE_STEPS) ** -0.4)


def lr_multiplier(step: int, num_iterations: int, options: TrainOptions) -> float:
    """Learning-rate multiplier at `step`: linear warmup, plateau, linear warmdown."""
    warmup = round(options.warmup_ratio * num_iterations)
    warmdown = round(options.warmdown_ratio * num_iterations)
    scale = 1.0
    if step < warmup:
        scale = (step + 1) / warmup
    elif step > num_iterations - warmdown:
        left = (num_iterations - step) / warmdown
        scale = left + (1 - left) * options.final_lr_frac
    return options.init_lr_frac * scale
