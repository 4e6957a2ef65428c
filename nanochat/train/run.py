"""A training run: its state, and everything around its steps (logging, signals, evaluation, checkpoints)."""

import dataclasses
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from nanochat import paths
from nanochat.data.batches import StepData
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, commit, is_out_of_memory, peak_memory_bytes, software
from nanochat.telemetry.console import LOG_FILE
from nanochat.telemetry.run_log import RunLog
from nanochat.train.checkpoint import CheckpointWriter
from nanochat.train.memory_guard import MemoryGuard
from nanochat.train.optim import MuonAdamW
from nanochat.train.options import TrainOptions
from nanochat.train.sharding import GradientReducer
from nanochat.train.signals import SignalHandler, StopRequested
from nanochat.train.watchdog import Watchdog
from nanochat.units import format_duration, format_gib

MAX_BAD_STEPS = 10  # consecutive steps with a non-finite loss or gradient after which a run ends


class Evaluation(NamedTuple):
    """A periodic measurement, made by all processes together."""

    every: int
    """steps between measurements; 0: at the end only"""
    measure: Callable[[Callable[[], None]], dict[str, float]]
    """is passed a function to call between batches, equally often in every process, which raises StopRequested in all
    of them if one was asked to stop"""


class StepResult(NamedTuple):
    """Loss, token count and gradient norm of one optimizer step."""

    loss: float  # mean over the tokens, in nats
    num_tokens: int  # trained on, over all processes
    gradient_norm: float  # before clipping

    @property
    def is_finite(self) -> bool:
        """False if the step was skipped."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass
class TrainingRun:
    """Model, optimizer and progress of one stage's training. Created by nanochat.train.resume."""

    source: str  # name of the stage
    tag: str
    options: TrainOptions
    runtime: Runtime
    tokenizer_hash: str
    model: GPT
    optimizer: MuonAdamW
    parent: dict[str, Any] | None = None  # checkpoint this stage started from; None for pretraining
    data: str | None = None  # identifies the data; a run on different data is a different run
    first_row: int = 0  # where in the order of the rows of text it began; after those of its parent with --from
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))  # kept on resume
    step: int = 0  # optimizer steps taken
    previous_seconds: float = 0.0  # wall time before the last resume
    results: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: int = 0  # step of the last evaluation
    saved_at: float = 0.0  # Unix time at which the current step was first saved
    best: dict[str, float] = field(default_factory=dict)  # lowest bits per byte of any evaluation, and its step
    bpb_before: float | None = None  # with --from, bits per byte of the held-out text before training
    skipped_steps: int = 0  # steps skipped because of a non-finite loss or gradient
    bad_steps: int = 0  # skipped steps since the last good one
    tracker_id: str | None = None  # id of this run in wandb or trackio
    max_rows: int = sys.maxsize  # rows in one forward pass; lowered when memory runs out

    def __post_init__(self) -> None:
        self.reducer = GradientReducer(self.optimizer.shards, self.world)
        self.report: Callable[[str], None] = print  # prints a line about the run, also to the log during training
        self.check_memory: Callable[[int], None] = lambda rows: None  # raises MemoryError to ask for fewer
        if self.options.fp8:
            self.model.train_in_fp8()

    @property
    def world(self) -> World:
        return self.runtime.world

    @property
    def seconds(self) -> float:
        """Wall time of this stage so far, over all resumes."""
        return self.previous_seconds + time.monotonic() - self.runtime.started

    @property
    def folder(self) -> Path:
        return paths.checkpoints_dir(self.source) / self.tag

    def should_compile(self, num_iterations: int, fixed_tokens: int | None) -> bool:
        """Follow --compile if given; else compile if that shortens the run. A resumed run decides the same."""
        wanted = bool(self.options.compile)
        if self.options.compile is None and fixed_tokens is not None:
            config = self.model.config
            tokens = num_iterations * fixed_tokens / self.world.size
            wanted = self.runtime.compile_pays_off(tokens * config.n_layer * config.n_embd)
        path = self.runtime.unquoted_path()
        if wanted and path:
            self.report(f"note: torch.compile is off, it does not support the white space in {path}")
        return wanted and not path

    def metrics(self, data: StepData, result: StepResult, lr_scale: float, seconds: float) -> dict[str, float]:
        """One line of metrics.jsonl."""
        tokens = sum(batch.tokens.numel() for batch in data.batches)
        flops = sum(
            batch.tokens.numel() * self.model.flops_per_token(batch.tokens.size(1), batch.trained_share)
            for batch in data.batches
        )
        return {
            "loss": result.loss,
            "lr_scale": lr_scale,
            "gradient_norm": result.gradient_norm,
            "tokens": result.num_tokens,
            "tokens_per_second": tokens / seconds * self.world.size,
            "flops_per_second": flops / seconds * self.world.size,
            "mfu": flops / seconds / self.peak_flops[0],
            "skipped_steps": self.skipped_steps + (not result.is_finite),
            "seconds": self.seconds,
            **data.metrics,
        }

    @cached_property
    def peak_flops(self) -> tuple[float, str]:
        return self.runtime.peak_flops()

    def needs_evaluation(self, evaluation: Evaluation | None) -> bool:
        """True if the current step has not been evaluated."""
        return evaluation is not None and self.evaluated < self.step

    def facts(self, num_iterations: int, trained_on: str) -> dict[str, Any]:
        """Facts known at the start of a run, for its checkpoints and the report. JSON-serializable."""
        return {
            "source": self.source,
            "tag": self.tag,
            "num_iterations": num_iterations,
            "trained_on": trained_on,
            "tokenizer": self.tokenizer_hash,
            "model_config": dataclasses.asdict(self.model.config),
            "num_parameters": self.model.config.num_parameters,
            "options": dataclasses.asdict(self.options),
            "parent": self.parent,
            "data": self.data,
            "first_row": self.first_row,
            "machine": self.runtime.describe(),
            "software": software(),
            "commit": commit(),
        }

    def progress(self) -> dict[str, Any]:
        """The part of meta.json that changes during a run."""
        return {
            "run_id": self.run_id,
            "saved_at": self.saved_at,
            "seconds": self.seconds,
            "results": self.results,
            "evaluated": self.evaluated,
            "best": self.best,
            "bpb_before": self.bpb_before,
            "skipped_steps": self.skipped_steps,
            "tracker_id": self.tracker_id,
            "peak_memory": peak_memory_bytes(self.runtime.device),
        }


@dataclass
class Session:
    """Everything around the steps of one `train` call: log, signals, evaluation, samples, checkpoints."""

    run: TrainingRun
    num_iterations: int
    trained_on: str
    step_size: str
    samples: Callable[[], list[str]]
    evaluation: Evaluation | None
    stop: bool = False  # a process was asked to stop
    unsaved: bool = False  # a save is due that has not been made

    def __post_init__(self) -> None:
        run, options = self.run, self.run.options
        self.sample_every = -(-self.num_iterations // 10) if options.sample_every is None else options.sample_every
        self.facts = run.facts(self.num_iterations, self.trained_on)
        self.writer = CheckpointWriter(run.folder, options.keep_last, options.keep_every)
        self.signals = SignalHandler()
        self.rerun = "the same command without --fresh" if options.fresh else "the same command"

    def __enter__(self) -> "Session":
        with ExitStack() as stack:
            self.log = stack.enter_context(RunLog(self.run, self.num_iterations, self.facts))
            stop = partial(setattr, self.signals, "stop", True)
            guard = MemoryGuard(self.run.runtime.device, self.log.print, stop)
            for context in (self.signals, self.writer, Watchdog(self.run.world, self.log.last_words), guard):
                stack.enter_context(context)
            self.run.check_memory = guard.check
            stack.callback(setattr, self.run, "report", print)
            self.run.report = self.log.print
            self._introduce()
            self._contexts = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError("the GPU is out of memory: rerun with half the --device-batch-size; it resumes")
            self._contexts.__exit__(UserError, error, trace)
            raise error from None
        self._contexts.__exit__(kind, error, trace)

    def after_step(self, result: StepResult, metrics: dict[str, float]) -> None:
        """Evaluate, log, sample and save, as far as due; sets `stop`."""
        run, log = self.run, self.log
        finished = run.step == self.num_iterations
        run.bad_steps = 0 if result.is_finite else run.bad_steps + 1
        run.skipped_steps += not result.is_finite
        if run.bad_steps:
            log.print(f"step {run.step}: non-finite loss or gradient, step skipped")
            if run.bad_steps >= MAX_BAD_STEPS:
                raise UserError(f"{MAX_BAD_STEPS} consecutive steps had a non-finite loss or gradient: {self._remedy}")
        hurry = run.world.any(self.signals.stop)  # a kill may follow soon: save first
        if self.evaluation and not (hurry or finished) and is_due(run.step, self.evaluation.every):
            metrics |= self._evaluate(self.evaluation)
        log.step(run.step, metrics, run.results)
        if run.world.is_main and not hurry and (finished or is_due(run.step, self.sample_every)):
            self._write_samples()
        self._report_failed_save(self.writer.failure())
        self.stop, save_now = (n > 0 for n in run.world.sum(self.signals.stop, self.signals.take_save()))
        if save_now:
            log.print(f"saving at step {run.step} (SIGUSR1)")
        self.unsaved |= self.stop or save_now or finished or is_due(run.step, run.options.save_every)
        if self.unsaved and not run.bad_steps:  # after a bad step, the weights may be the cause: wait for a good one
            run.saved_at = time.time()
            self._save()
            self.unsaved = False

    def finish(self) -> None:
        """Run the last evaluation and save its results. Raises KeyboardInterrupt if stopped before the end."""
        run, log = self.run, self.log
        if self.evaluation and not self.stop and not self.unsaved:
            results = self._evaluate(self.evaluation)
            if results:
                log.results(run.step, results, run.seconds)
                self._save()
            self.stop = run.world.any(self.signals.stop)
        failure = run.world.call_on_main(self.writer.finish)
        if failure:
            raise UserError(f"{failure}: free some space, then {self.rerun} resumes from the checkpoint before it")
        if self.unsaved:
            log.print(f"step {run.step} was not finite, so it is not saved; the last checkpoint is kept")
        if self.stop and (run.step < self.num_iterations or run.needs_evaluation(self.evaluation)):
            saved = "stopped" if self.unsaved else "saved and stopped"
            log.print(f"{saved} at step {run.step}; {self.rerun} resumes from the last checkpoint")
            run.world.leave()  # all processes stop here
            raise KeyboardInterrupt
        if self.unsaved:
            raise UserError(f"the last step had a non-finite loss or gradient: {self._remedy}")
        skipped = f" ({run.skipped_steps} skipped)" if run.skipped_steps else ""
        log.print(
            f"{run.source} {run.tag}: {run.step} steps{skipped} in {format_duration(run.seconds)}, "
            f"peak memory {format_gib(peak_memory_bytes(run.runtime.device))}, saved in {run.folder}"
        )

    @property
    def _remedy(self) -> str:
        return f"resume from the last checkpoint in {self.run.folder} with a lower --matrix-lr and --embedding-lr"

    def _introduce(self) -> None:
        run, log = self.run, self.log
        config, options = run.model.config, run.options
        begin = f"resuming at step {run.step}" if run.step else "starting"
        if run.parent and not run.step:
            begin += f" from {run.parent['source']} step {run.parent['step']}"
        log.print(
            f"{run.source} {run.tag}: {config.num_parameters:,} parameters ({config.n_layer} layers of width "
            f"{config.n_embd}, context {config.sequence_len}), {begin}, {self.num_iterations:,} steps of "
            f"{self.step_size}"
        )
        flops, origin = run.peak_flops
        fp8 = "; matrices inside the blocks multiply in FP8; mfu is relative to this peak" if options.fp8 else ""
        log.print(f"on {run.runtime.describe()}, peak {flops / 1e12:,.2f} TFLOP/s ({origin}){fp8}")
        log.print(f"follow it with ./nanochat.sh watch{paths.demo_option()}, or tail -f {run.folder / LOG_FILE}")
        log.print(f"Ctrl-C (or kill -INT {os.getpid()}) saves and stops; {self.rerun} resumes")

    def _evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """Results of the evaluation; empty if it was interrupted or ran out of memory."""
        run = self.run

        def check_stop() -> None:
            if run.world.any(self.signals.stop):
                raise StopRequested

        try:
            run.results = evaluation.measure(check_stop)
        except StopRequested:
            self.log.print(f"step {run.step}: evaluation interrupted; it runs again when next due")
            return {}
        except (RuntimeError, MemoryError) as error:
            # Several processes stopped in mid-evaluation have no common point to continue from.
            if not is_out_of_memory(error) or run.world.size > 1:
                raise
            self.log.print(f"step {run.step}: out of memory, evaluation skipped")
            return {}
        run.evaluated = run.step
        if run.results.get("bpb", math.inf) < run.best.get("bpb", math.inf):
            run.best = {"step": run.step, "bpb": run.results["bpb"]}
        return run.results

    def _write_samples(self) -> None:
        try:
            self.log.samples(self.run.step, self.samples())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.log.print(f"step {self.run.step}: out of memory, sampling skipped")

    def _save(self) -> None:
        """Start writing a checkpoint; training may continue when this returns."""
        run = self.run
        optimizer_state = run.optimizer.full_state()  # a collective
        if run.world.is_main:
            self._report_failed_save(self.writer.finish())
            self.log.sync()
            meta = self.facts | run.progress()
            self.writer.start(run.step, run.model.state_dict(), optimizer_state, meta)

    def _report_failed_save(self, failure: str | None) -> None:
        if failure:
            self.log.print(f"{failure}: free some space; training continues and older checkpoints are kept")


def is_due(step: int, every: int) -> bool:
    """True at multiples of `every`; never if that is 0."""
    return every > 0 and step % every == 0


def rebuild_report(run: TrainingRun) -> None:
    """Rebuild the report in another process, because it imports matplotlib and every task."""
    if run.world.is_main:
        command = [sys.executable, "-m", "scripts.report", "--model-tag", run.tag, "--quiet"]
        subprocess.run(command, check=False)
