"""The one training loop. Pretraining, midtraining, SFT and RL differ in the batches they pass to it."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanochat import checkpoint, paths
from nanochat.checkpoint import SCRIPTS, Checkpoint
from nanochat.data.batches import BatchSource
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import IGNORE
from nanochat.optim import MuonAdamW, OptimizerOptions
from nanochat.options import TrainOptions
from nanochat.runtime import Runtime, peak_memory_bytes
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import MetricsLog, ProgressDisplay, Tracker, format_seconds

LOSS_SMOOTHING = 0.9
MOST_BAD_STEPS = 10
"""Steps in a row without a finite gradient after which the run ends."""

Evaluate = Callable[[], dict[str, float]]
Sample = Callable[[], list[str]]


@dataclass
class Training:
    """One stage's model and optimizer, and how far they are."""

    source: str
    tag: str
    options: TrainOptions
    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    optimizer: MuonAdamW
    parent: dict[str, Any] | None
    step: int = 0
    """optimizer steps taken"""
    seconds: float = 0.0
    """time spent training, over all resumes"""
    results: dict[str, float] = field(default_factory=dict)
    """the last evaluation"""

    @property
    def folder(self) -> Path:
        """Where this model's checkpoints are."""
        return paths.checkpoints_dir(self.source) / self.tag

    def run(
        self,
        batches: BatchSource,
        num_iterations: int,
        *,
        evaluate: Evaluate | None = None,
        sample: Sample | None = None,
    ) -> None:
        """Train until `num_iterations` steps are taken, from wherever it stands; save as it goes.

        `evaluate` runs on every process; `sample` on the main one.
        """
        console = Console() if self.runtime.is_main else None
        display = ProgressDisplay(f"{self.source} {self.tag}", num_iterations, self.step, console)
        if self.step >= num_iterations:
            display.say(f"{self.source} {self.tag} is complete at step {self.step}; --fresh starts over")
            display.close()
            return
        log = MetricsLog(self.folder / "metrics.jsonl", self.step) if self.runtime.is_main else None
        tracker = self._tracker()
        try:
            self._announce(display, num_iterations)
            self._loop(batches, num_iterations, evaluate, sample, display, log, tracker)
        finally:
            display.close()
            tracker.close()
            if log:
                log.close()

    def _loop(
        self,
        batches: BatchSource,
        num_iterations: int,
        evaluate: Evaluate | None,
        sample: Sample | None,
        display: ProgressDisplay,
        log: MetricsLog | None,
        tracker: Tracker,
    ) -> None:
        options = self.options
        peak, _ = self.runtime.peak_flops()
        smooth_loss, bad_steps = math.nan, 0
        if options.compile if options.compile is not None else self.runtime.device.type == "cuda":
            self.model.compile_training()
        while self.step < num_iterations:
            begun = time.perf_counter()
            data = batches.step_data(self.step)
            lr_scale = lr_multiplier(self.step, num_iterations, options)
            loss, tokens, gradient_norm = self._backward(data.batches)
            if math.isfinite(gradient_norm):
                bad_steps = 0
                if tokens:
                    self.optimizer.step(lr_scale)
            else:
                bad_steps += 1
                display.say(f"step {self.step}: the gradient is not finite, so the step is left out")
                if bad_steps >= MOST_BAD_STEPS:
                    raise UserError(
                        f"{MOST_BAD_STEPS} steps in a row had no finite gradient: run again with lower learning "
                        f"rates; the last checkpoint in {self.folder} is good"
                    )
            self.runtime.synchronize()
            elapsed = time.perf_counter() - begun
            self.seconds += elapsed
            self.step += 1
            smooth_loss = loss if math.isnan(smooth_loss) else smooth_loss + (1 - LOSS_SMOOTHING) * (loss - smooth_loss)
            own_tokens_per_second = sum(batch.tokens.numel() for batch in data.batches) / elapsed
            metrics = {
                "loss": loss,
                "lr_scale": lr_scale,
                "gradient_norm": gradient_norm,
                "tokens": tokens,
                "tokens_per_second": own_tokens_per_second * self.runtime.share.world_size,
                "mfu": self.model.flops_per_token() * own_tokens_per_second / peak,
                "seconds": self.seconds,
                **data.metrics,
            }
            finished = self.step == num_iterations
            if evaluate and (finished or (options.eval_every and self.step % options.eval_every == 0)):
                self.results = evaluate()
                metrics |= self.results
            figures = {"loss": f"{smooth_loss:.3f}", **{k: f"{v:.3f}" for k, v in self.results.items()}}
            if "reward" in data.metrics:
                figures = {"reward": f"{data.metrics['reward']:.2f}"}
            shown = "  ".join(f"{name} {figure}" for name, figure in figures.items())
            display.update(self.step, f"{shown}  {metrics['tokens_per_second']:,.0f} tok/s")
            tracker.log(self.step, metrics)
            if log:
                log.log(self.step - 1, metrics)
            if sample and self.runtime.is_main and (
                finished or (options.sample_every and self.step % options.sample_every == 0)
            ):  # fmt: skip
                for text in sample():
                    display.say(f"  {text}")
            if finished or (options.save_every and self.step % options.save_every == 0):
                self._save(num_iterations)
        display.say(
            f"{self.source} {self.tag}: {self.step} steps in {format_seconds(self.seconds)}, "
            f"{peak_memory_bytes(self.runtime.device) / 2**30:.1f} GiB at most, saved in {self.folder}"
        )

    def _backward(self, batches: list) -> tuple[float, int, float]:
        """Gradients of this step's mean loss, over all processes: (loss, tokens trained on, gradient norm).

        The mean is over the tokens of the whole step, so micro-batches and processes with fewer of them weigh less,
        and one that has none does no harm.
        """
        device = self.runtime.device
        own_tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        tokens = int(self.runtime.sum(torch.tensor(own_tokens, device=device)))
        for parameter in self.model.parameters():
            parameter.grad = None
        total = torch.zeros((), device=device)
        if tokens == 0:
            return 0.0, 0, 0.0
        for batch in batches:
            loss = self.model.loss(*batch.to(device)) / tokens
            loss.backward()
            total += loss.detach()
        gradients = [
            parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            for parameter in self.model.parameters()
        ]
        if self.runtime.share.world_size > 1:
            flat = self.runtime.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for parameter, part in zip(
                self.model.parameters(), flat.split([gradient.numel() for gradient in gradients]), strict=True
            ):
                parameter.grad = part.view_as(parameter)
        most = self.options.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        return float(self.runtime.sum(total)), tokens, float(norm)

    def _save(self, num_iterations: int) -> None:
        """Let the main process write a checkpoint."""
        if self.runtime.is_main:
            meta = {
                "source": self.source,
                "tag": self.tag,
                "num_iterations": num_iterations,
                "tokenizer": self.tokenizer.hash,
                "model_config": dataclasses.asdict(self.model.config),
                "options": dataclasses.asdict(self.options),
                "parent": self.parent,
                "seconds": self.seconds,
                "results": self.results,
                "machine": self.runtime.describe(),
                "peak_memory": peak_memory_bytes(self.runtime.device),
            }
            checkpoint.save(
                self.folder, self.step, self.model, self.optimizer.state_dict(), meta, self.options.keep_last
            )
        self.runtime.barrier()

    def _tracker(self) -> Tracker:
        kind = self.options.tracker if self.runtime.is_main else "none"
        return Tracker(kind, self.options.run, f"nanochat-{self.source}", dataclasses.asdict(self.options))

    def _announce(self, display: ProgressDisplay, num_iterations: int) -> None:
        peak, origin = self.runtime.peak_flops()
        config = self.model.config
        begin = f"resuming at step {self.step}" if self.step else "starting"
        if self.parent and not self.step:
            begin += f" from {self.parent['source']} step {self.parent['step']}"
        display.say(
            f"{self.source} {self.tag}: {config.num_parameters:,} parameters "
            f"({config.n_layer} layers of {config.n_embd}, context {config.sequence_len}), {begin}, "
            f"{num_iterations} steps of {self.options.total_batch_size:,} tokens\n"
            f"on {self.runtime.describe()}, peak {peak / 1e12:,.2f} TFLOP/s ({origin})"
        )


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


def begin(
    source: str,
    options: TrainOptions,
    runtime: Runtime,
    tokenizer: Tokenizer,
    *,
    parent: Checkpoint | None = None,
    config: GPTConfig | None = None,
) -> Training:
    """Resume the newest checkpoint of this model, or start it: from `parent`'s weights, or anew in shape `config`.

    A checkpoint that grew from another parent is not resumed. What a new start replaces is set aside under a name
    with the time. Raises UserError if the checkpoint has another shape or tokenizer than asked for.
    """
    tag = options.model_tag or (parent.tag if parent else f"d{config.n_layer}" if config else "")
    lineage = parent and {key: parent.meta[key] for key in ("source", "tag", "step", "saved_at")}
    existing = checkpoint.newest(source, tag)
    if existing and not options.fresh and existing.meta["parent"] == lineage:
        model = existing.load_model(runtime.device, runtime.compute_dtype, tokenizer)
        if config and model.config != config:
            raise UserError(
                f"{existing.folder} holds a model of another shape: go on with its options, start over with "
                f"{SCRIPTS[source]} --fresh, or name a new model with --model-tag"
            )
        optimizer = MuonAdamW(model, optimizer_options(options))
        optimizer.load_state_dict(existing.load_optimizer(runtime.device))
        meta = existing.meta
        return Training(
            source, tag, options, runtime, tokenizer, model, optimizer, lineage,
            step=existing.step, seconds=meta["seconds"], results=meta["results"],
        )  # fmt: skip
    runtime.barrier()  # all have looked before the main process moves anything
    if existing and runtime.is_main:
        set_aside = existing.folder.parent.with_name(time.strftime(f"{tag}.%Y%m%d-%H%M%S"))
        existing.folder.parent.rename(set_aside)
        print(f"the {source} model {tag} that was here is kept as {set_aside.name}")
    runtime.barrier()
    if parent:
        model = parent.load_model(runtime.device, runtime.compute_dtype, tokenizer)
    else:
        assert config is not None
        torch.manual_seed(options.seed)
        with torch.device(runtime.device):
            model = GPT(config, runtime.compute_dtype)
    optimizer = MuonAdamW(model, optimizer_options(options))
    return Training(source, tag, options, runtime, tokenizer, model, optimizer, lineage)


def optimizer_options(options: TrainOptions) -> OptimizerOptions:
    """The optimizer's part of a stage's options; what is None keeps the optimizer's default."""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay")
    return OptimizerOptions(**{name: v for name in names if (v := getattr(options, name)) is not None})


def parent_of(source: str, tag: str | None) -> Checkpoint:
    """The newest checkpoint of the stage before `source`. Raises UserError, naming the script to run, if none."""
    before = list(paths.CHECKPOINT_FOLDERS)[list(paths.CHECKPOINT_FOLDERS).index(source) - 1]
    return checkpoint.find(before, tag)
