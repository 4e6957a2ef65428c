"""The one training loop. Pretraining, midtraining, SFT and RL differ in the batches they pass to it."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import paths
from nanochat.data.batches import Batch, BatchSource
from nanochat.errors import UserError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, is_out_of_memory, peak_memory_bytes, software
from nanochat.telemetry.console import LOG_FILE
from nanochat.telemetry.run_log import RunLog
from nanochat.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train.gradients import StepGradients, StepResult
from nanochat.train.optim import MuonAdamW
from nanochat.train.options import TrainOptions
from nanochat.train.saving import CheckpointWriter, commit
from nanochat.train.scaling import lr_multiplier
from nanochat.train.signals import Interruption, StopAskedError
from nanochat.train.watchdog import Watchdog
from nanochat.units import format_duration

MOST_BAD_STEPS = 10
"""Steps in a row without a finite gradient after which the run ends."""


class Evaluation(NamedTuple):
    """Something measured on the way, by every process."""

    every: int
    """steps between; 0: at the end only"""
    measure: Callable[[Callable[[], None]], dict[str, float]]
    """calls what it is given now and then, equally often in every process; it raises StopAskedError in all of them
    when one was asked to stop"""


@dataclass
class Training:
    """One stage's model and optimizer, and how far they are. Made by nanochat.train.resume.begin."""

    source: str
    tag: str
    options: TrainOptions
    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    optimizer: MuonAdamW
    parent: dict[str, Any] | None
    """the checkpoint this stage started from; None for pretraining"""
    data: str | None = None
    """identifies the data, where other data makes another run"""
    step: int = 0
    """optimizer steps taken"""
    seconds_before: float = 0.0
    """wall time of the runs that this one resumes"""
    results: dict[str, float] = field(default_factory=dict)
    """the last evaluation"""
    evaluated: int = 0
    """its step"""
    saved_at: float = 0.0
    """when its step was first saved, in seconds since 1970: what a checkpoint is known by"""
    best: dict[str, float] = field(default_factory=dict)
    """the lowest bits per byte of any evaluation, and its step"""
    skipped_steps: int = 0
    """left out because the loss or its gradient was not finite"""
    bad_steps: int = 0
    """of those, the ones since the last good step"""
    tracker_id: str | None = None
    """what wandb or trackio calls this run"""
    most_rows: int = sys.maxsize
    """in one forward pass; fewer than the batches have once memory has run out"""

    def __post_init__(self) -> None:
        self.gradients = StepGradients(self.model, self.optimizer, self.runtime, self.options.grad_clip)
        self._shapes: set[torch.Size] = set()
        if self.options.fp8:
            self.model.train_in_fp8()

    @property
    def seconds(self) -> float:
        """Wall time of this stage so far, loading and evaluating included, over all resumes."""
        return self.seconds_before + time.monotonic() - self.runtime.started

    @property
    def folder(self) -> Path:
        """Where this model's checkpoints are."""
        return paths.checkpoints_dir(self.source) / self.tag

    def run(
        self,
        batches: BatchSource,
        num_iterations: int,
        *,
        learns: str,
        step_size: str,
        fixed_tokens: int | None,
        samples: Callable[[], list[str]],
        evaluation: Evaluation | None = None,
    ) -> None:
        """Train until `num_iterations` steps are taken, from wherever it stands; save as it goes.

        `learns` tells a person what is learned from, `step_size` what a step is, such as "4,096 tokens"; `fixed_tokens`
        are those of a step where all batches have the same shape, or one of two; `samples` lets the model write, a few
        lines. The last step is saved before it is evaluated, and once more with what that found. After Ctrl-C or
        SIGTERM it saves at the end of the step, leaving an evaluation that is on the way, and raises KeyboardInterrupt;
        where that was the last one, the next call makes it.
        """
        if self.step >= num_iterations and not self._is_unevaluated(evaluation):
            if self.runtime.world.is_main:
                print(f"{self.source} {self.tag} is complete at step {self.step}; --fresh starts over")
            return
        if self.wants_compiling(num_iterations, fixed_tokens):
            self.model.compile_training()
        peak_flops, origin = self.runtime.peak_flops()
        facts = self.facts(num_iterations, learns)
        sample_every = self.options.sample_every
        if sample_every is None:
            sample_every = -(-num_iterations // 10)
        writer = CheckpointWriter(self.folder, self.options.keep_last, self.options.keep_every)
        with (
            RunLog(self, num_iterations, facts) as log,
            Interruption() as asked,
            writer,
            Watchdog(self.runtime, log.last_words) as watchdog,
            memory.explained(),
        ):
            log.say(self._introduction(num_iterations, step_size))
            log.say(f"on {self.runtime.describe()}, peak {peak_flops / 1e12:,.2f} TFLOP/s ({origin})")
            if self.options.fp8:
                log.say("the matrices inside the blocks multiply in FP8; mfu is still the share of that peak")
            log.say(f"to follow it: ./nanochat.sh watch, or tail -f {self.folder / LOG_FILE}")
            log.say(f"to stop it: Ctrl-C, or kill -INT {os.getpid()}; it saves, and {self._again} goes on from there")
            stop = unsaved = False
            while self.step < num_iterations and not stop:
                with watchdog.step():
                    metrics = self._step(batches, num_iterations, peak_flops, log, watchdog)
                finished = self.step == num_iterations
                if self.bad_steps:
                    log.say(f"step {self.step}: the loss or its gradient is not finite, so the step is left out")
                    self._give_up_after_too_many()
                hurried = self.runtime.world.sum(asked.stop)[0] > 0  # who stops it may kill it soon: saving first
                if evaluation and not (hurried or finished) and due(self.step, evaluation.every, finished):
                    metrics |= self._evaluate(evaluation, asked, log)
                log.step(self.step, metrics, self.results)
                if self.runtime.world.is_main and not hurried and due(self.step, sample_every, finished):
                    self._write_samples(samples, log)
                self._tell_failed_save(writer.failure(), log)
                stop, save_now = (number > 0 for number in self.runtime.world.sum(*asked.requests()))
                if save_now:
                    log.say(f"saving at step {self.step}, as SIGUSR1 asks")
                unsaved = unsaved or stop or save_now or due(self.step, self.options.save_every, finished)
                if unsaved and not self.bad_steps:  # else the weights may be what is bad: after the next good step
                    self.saved_at = time.time()
                    self._save(writer, facts, log)
                    unsaved = False
            if evaluation and not stop and not unsaved:  # minutes, in which the last steps must not be at stake
                results = self._evaluate(evaluation, asked, log)
                if results:
                    log.results(self.step, results, self.seconds)
                    self._save(writer, facts, log)
                stop = self.runtime.world.sum(asked.stop)[0] > 0
            failure = writer.finish()
            self.runtime.world.barrier()
            if failure:
                raise UserError(f"{failure}: make room, and {self._again} goes on from the checkpoint before it")
            if unsaved:
                log.say(f"step {self.step} is not saved, for it was not finite; the last checkpoint is kept")
            if stop and (self.step < num_iterations or self._is_unevaluated(evaluation)):
                log.say(f"stopped at step {self.step}: {self._again} goes on from the last checkpoint")
                raise KeyboardInterrupt
            if unsaved:
                raise UserError(f"the last step had no finite loss or gradient: {self._remedy}")
            skipped = f", {self.skipped_steps} of them left out" if self.skipped_steps else ""
            log.say(
                f"{self.source} {self.tag}: {self.step} steps{skipped} in {format_duration(self.seconds)}, "
                f"{peak_memory_bytes(self.runtime.device) / 2**30:.1f} GiB at most, saved in {self.folder}"
            )

    def wants_compiling(self, num_iterations: int, fixed_tokens: int | None) -> bool:
        """Whether to compile: as the option says, else where it pays, which is the same when the run is resumed."""
        if self.options.compile is not None or fixed_tokens is None:
            return bool(self.options.compile)
        config = self.model.config
        tokens = num_iterations * fixed_tokens / self.runtime.world.size
        return self.runtime.compile_pays_off(tokens * config.n_layer * config.n_embd)

    def _is_unevaluated(self, evaluation: Evaluation | None) -> bool:
        """Whether what the last step is to be measured by is still to be made."""
        return evaluation is not None and self.evaluated < self.step

    @property
    def _again(self) -> str:
        """The command to go on with, for a person."""
        return "the same command without --fresh" if self.options.fresh else "the same command"

    def _step(
        self, batches: BatchSource, num_iterations: int, peak_flops: float, log: RunLog, watchdog: Watchdog
    ) -> dict[str, float]:
        """One optimizer step; what there is to log of it."""
        begun = time.perf_counter()
        data = batches.step_data(self.step)
        if self._compiles(data.batches):
            watchdog.compiles_again()
        lr_scale = lr_multiplier(self.step, num_iterations, self.options)
        result = self._gradients(data.batches, log, watchdog)
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            self.skipped_steps, self.bad_steps = self.skipped_steps + 1, self.bad_steps + 1
        else:
            self.bad_steps = 0
            if result.tokens:
                self.optimizer.step(lr_scale)
        self.runtime.synchronize()
        elapsed = time.perf_counter() - begun
        self.step += 1
        own_tokens = sum(batch.tokens.numel() for batch in data.batches)
        flops = sum(self._flops(batch) for batch in data.batches)
        return {
            "loss": result.loss,
            "lr_scale": lr_scale,
            "gradient_norm": result.gradient_norm,
            "tokens": result.tokens,
            "tokens_per_second": own_tokens / elapsed * self.runtime.world.size,
            "flops_per_second": flops / elapsed * self.runtime.world.size,
            "mfu": flops / elapsed / peak_flops,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
            **data.metrics,
        }

    def _flops(self, batch: Batch) -> float:
        """What it takes to train on it."""
        trained_share = batch.num_trained / batch.targets.numel()
        return batch.tokens.numel() * self.model.flops_per_token(batch.tokens.size(1), trained_share)

    def _compiles(self, batches: Sequence[Batch]) -> bool:
        """Whether the model is compiled, but not yet for all of these shapes."""
        new = {batch.tokens.shape for batch in batches} - self._shapes
        self._shapes |= new
        return self.model.is_compiled and bool(new)

    def _gradients(self, batches: Sequence[Batch], log: RunLog, watchdog: Watchdog) -> StepResult:
        """The step's gradients; on fewer rows at once where memory runs out, which leaves the result the same."""
        while True:
            try:
                return self.gradients.compute(batches, self.most_rows)
            except memory.ExhaustedError:
                rows = min(self.most_rows, max((len(batch.tokens) for batch in batches), default=1))
            rows = self.runtime.world.max(rows)  # one that has few rows needs no smaller batches than the others
            self.most_rows = (rows + 1) // 2
            if rows == 1:
                raise UserError("memory ran out with a single row: train a smaller --depth")
            watchdog.compiles_again()
            log.say(
                f"step {self.step + 1}: memory ran out with {rows} rows at once, so it is taken again with "
                f"{self.most_rows}; the result is the same"
            )

    def _give_up_after_too_many(self) -> None:
        if self.bad_steps >= MOST_BAD_STEPS:
            raise UserError(f"{MOST_BAD_STEPS} steps in a row had no finite loss or gradient: {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"go on from the last checkpoint in {self.folder} with a lower --matrix-lr and --embedding-lr"

    def _evaluate(self, evaluation: Evaluation, asked: Interruption, log: RunLog) -> dict[str, float]:
        """The evaluation's results; none where it was left because `asked` to stop, or for want of memory."""

        def leave_if_asked() -> None:
            if self.runtime.world.sum(asked.stop)[0] > 0:
                raise StopAskedError

        try:
            self.results = evaluation.measure(leave_if_asked)
        except StopAskedError:
            log.say(f"step {self.step}: the evaluation is left, to stop soon; it is made again when next due")
            return {}
        except (RuntimeError, MemoryError) as error:
            # With others in the middle of it, there is no way back to where all go on.
            if not is_out_of_memory(error) or self.runtime.world.size > 1:
                raise
            log.say(f"step {self.step}: memory ran out in the evaluation, so it is left out")
            return {}
        self.evaluated = self.step
        if self.results.get("bpb", math.inf) < self.best.get("bpb", math.inf):
            self.best = {"step": self.step, "bpb": self.results["bpb"]}
        return self.results

    def _write_samples(self, samples: Callable[[], list[str]], log: RunLog) -> None:
        try:
            log.samples(self.step, samples())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.say(f"step {self.step}: memory ran out in the samples, so they are left out")

    def facts(self, num_iterations: int, learns: str) -> dict[str, Any]:
        """What is known of the run from its start, for its checkpoints and the report. Survives JSON."""
        return {
            "source": self.source,
            "tag": self.tag,
            "num_iterations": num_iterations,
            "learns": learns,
            "tokenizer": self.tokenizer.hash,
            "model_config": dataclasses.asdict(self.model.config),
            "num_parameters": self.model.config.num_parameters,
            "options": dataclasses.asdict(self.options),
            "parent": self.parent,
            "data": self.data,
            "machine": self.runtime.describe(),
            "software": software(),
            "commit": commit(),
        }

    def _save(self, writer: CheckpointWriter, facts: Mapping[str, Any], log: RunLog) -> None:
        """Begin to write a checkpoint; when this returns, the state may change again."""
        optimizer_state = self.optimizer.state_dict()  # every process has a part in it
        if not self.runtime.world.is_main:
            return
        self._tell_failed_save(writer.finish(), log)
        log.sync()
        meta = {
            **facts,
            "saved_at": self.saved_at,
            "seconds": self.seconds,
            "results": self.results,
            "evaluated": self.evaluated,
            "best": self.best,
            "skipped_steps": self.skipped_steps,
            "tracker_id": self.tracker_id,
            "peak_memory": peak_memory_bytes(self.runtime.device),
        }
        writer.start(self.step, self.model.state_dict(), optimizer_state, meta)

    def _tell_failed_save(self, failure: str | None, log: RunLog) -> None:
        if failure:
            log.say(f"{failure}: make room; the run goes on, and what was saved before is kept")

    def _introduction(self, num_iterations: int, step_size: str) -> str:
        config = self.model.config
        begin = f"resuming at step {self.step}" if self.step else "starting"
        if self.parent and not self.step:
            begin += f" from {self.parent['source']} step {self.parent['step']}"
        return (
            f"{self.source} {self.tag}: {config.num_parameters:,} parameters ({config.n_layer} layers of "
            f"{config.n_embd}, context {config.sequence_len}), {begin}, {num_iterations:,} steps of {step_size}"
        )


def due(step: int, every: int, finished: bool) -> bool:
    """Whether something done every `every` steps (0: never), and at the end, is due after `step`."""
    return finished or (every > 0 and step % every == 0)
