"""The training loop. Pretraining, midtraining, SFT and RL differ only in their batches."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from nanochat.data.batches import Batch, BatchSource
from nanochat.errors import UserError
from nanochat.runtime import is_out_of_memory, release_memory
from nanochat.train.run import Evaluation, Session, StepResult, TrainingRun
from nanochat.train.scaling import lr_multiplier
from nanochat.train.sharding import clip_gradients


def train(
    run: TrainingRun,
    batches: BatchSource,
    num_iterations: int,
    *,
    trained_on: str,
    step_size: str,
    fixed_tokens: int | None,
    samples: Callable[[], list[str]],
    evaluation: Evaluation | None = None,
) -> None:
    """Train from the current step to `num_iterations`, evaluating, logging and saving along the way.

    `trained_on` describes the data and `step_size` a step, such as "4,096 tokens"; `fixed_tokens` is the number of
    tokens per step if all batches have one of at most two shapes; `samples` generates a few lines of text.
    After Ctrl-C or SIGTERM it saves at the end of the step and raises KeyboardInterrupt. The last step is saved
    before its evaluation and again with the results; if that is interrupted, the next call evaluates.
    """
    if run.step >= num_iterations and not run.needs_evaluation(evaluation):
        if run.world.is_main:
            print(f"{run.source} {run.tag} is complete at step {run.step}; --fresh starts over")
        return
    if run.should_compile(num_iterations, fixed_tokens):
        steps = {run.step, num_iterations - 1}  # rows may be shorter in the first steps
        parts = (part for step in steps for b in batches.step_data(step).batches for part in b.split(run.max_rows))
        run.model.compile_training(part.tokens.shape for part in parts)
    with Session(run, num_iterations, trained_on, step_size, samples, evaluation) as session:
        while run.step < num_iterations and not session.stop:
            start = time.perf_counter()
            data = batches.step_data(run.step)
            lr_scale = lr_multiplier(run.step, num_iterations, run.options)
            result = train_step(run, data.batches, lr_scale)
            if fixed_tokens is None:
                run.runtime.release_unused_memory()
            run.step += 1
            session.after_step(result, run.metrics(data, result, lr_scale, time.perf_counter() - start))
        session.finish()


def train_step(run: TrainingRun, batches: Sequence[Batch], lr_scale: float = 1.0) -> StepResult:
    """One optimizer step on the gradient of the mean loss over all tokens of all micro-batches and processes.

    The result does not depend on how rows are split into micro-batches. If memory runs out in any process, the
    step is repeated with half the rows. If the loss or gradient is not finite, the weights do not change.
    """
    num_tokens = int(run.world.sum(sum(batch.num_trained for batch in batches))[0])
    if num_tokens == 0:
        return StepResult(0.0, 0, 0.0)
    micro_batches = [part for batch in batches for part in batch.split(run.max_rows)]
    run.model.zero_grad()
    total, loss, out_of_memory = torch.zeros((), device=run.runtime.device), None, False
    try:
        for batch in micro_batches:
            run.check_memory(len(batch.tokens))
            loss = run.model.loss(*batch.to(run.runtime.device)) / num_tokens
            run.reducer.is_last_backward = batch is micro_batches[-1]
            loss.backward()
            total += loss.detach()
        mean_loss = float(total)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mean_loss, loss, out_of_memory = 0.0, None, True  # lets go of the autograd graph
    run.reducer.finish()  # also after running out of memory: the other processes wait for it
    mean_loss, failures = run.world.sum(mean_loss, out_of_memory)
    if failures:
        _halve_rows(run, micro_batches)
        return train_step(run, batches, lr_scale)
    max_norm = run.options.grad_clip or math.inf
    result = StepResult(mean_loss, num_tokens, clip_gradients(run.optimizer.own_shards, run.world, max_norm))
    if result.is_finite:
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
        run.optimizer.step()
    run.runtime.synchronize()
    return result


def _halve_rows(run: TrainingRun, micro_batches: Sequence[Batch]) -> None:
    rows = run.world.max(max((len(batch.tokens) for batch in micro_batches), default=1))
    if rows == 1:
        raise UserError("out of memory with a single row: train at a smaller --depth")
    run.max_rows = (rows + 1) // 2
    run.model.zero_grad()
    release_memory()  # before torch compiles the new shape
    run.report(
        f"step {run.step + 1}: out of memory with {rows} rows at once, repeated with {run.max_rows}; "
        "the result is the same"
    )
