"""Scaling rules: batch size, number of steps and learning-rate schedule from depth and training length."""

import math
from dataclasses import replace

from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime, fast_rows
from nanochat.train.options import PretrainOptions, TrainOptions

REFERENCE_TOKENS, REFERENCE_BATCH, MIN_BATCH = 11.2e9, 524_288, 2048


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

    A power law through two points: 2,048, measured to be better than 4,096 at 0.4 to 0.8 million tokens
    (docs/experiments.md), and nanochat's 524,288 at 11.2 billion. https://arxiv.org/abs/2505.13738 finds an exponent
    of 0.38 among larger models alone.
    """
    ideal = max(MIN_BATCH, REFERENCE_BATCH * (tokens / REFERENCE_TOKENS) ** 0.6)
    return max(1, round(2 ** round(math.log2(ideal)) / unit)) * unit


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
