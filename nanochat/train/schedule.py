"""What happens at which step: the learning rates, and what is done now and then."""

from nanochat.train.options import TrainOptions


def due(step: int, every: int, finished: bool) -> bool:
    """Whether something that is done every so many steps, and at the end, is done after `step`."""
    return finished or (every > 0 and step % every == 0)


def lr_multiplier(step: int, num_iterations: int, options: TrainOptions) -> float:
    """What the learning rates are multiplied with at `step`: a rise, a plateau, a fall, all linear."""
    warmup = round(options.warmup_ratio * num_iterations)
    warmdown = round(options.warmdown_ratio * num_iterations)
    scale = 1.0
    if step < warmup:
        scale = (step + 1) / warmup
    elif step > num_iterations - warmdown:
        left = (num_iterations - step) / warmdown
        scale = left + (1 - left) * options.final_lr_frac
    return options.init_lr_frac * scale
