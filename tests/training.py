"""A small model in training, for the tests of the loop and of what it writes."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import paths
from nanochat.conversations import Conversation, conversation
from nanochat.data.batches import BatchSource, Row, RowBatches, StepData
from nanochat.dist import World
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.tasks.task import GradedTask, Reply
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint, resume
from nanochat.train.checkpoint import Checkpoint
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.options import TrainOptions
from nanochat.train.run import TrainingRun
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE_LEN = 32
OPTIONS = TrainOptions(
    model_tag="test", tracker="none", device_type="cpu", device_batch_size=4, save_every=0, warmdown_ratio=0.0,
)  # fmt: skip
HOW: dict[str, Any] = {
    "trained_on": "few rows",
    "step_size": "8 rows",
    "fixed_tokens": 8 * SEQUENCE_LEN,
    "samples": lambda: ["well ..."],
}


class FewRows:
    """Rows of random tokens, few enough to learn by heart."""

    def __init__(self, count: int = 16) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 500, (count, SEQUENCE_LEN + 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Row:
        return Row(self.tokens[index, :-1], self.tokens[index, 1:])


def batches(rows: FewRows, options: TrainOptions = OPTIONS, world: World = World()) -> RowBatches:  # noqa: B008  # frozen
    assert isinstance(options.device_batch_size, int)
    return RowBatches(rows, rows_per_step=8, device_batch_size=options.device_batch_size, world=world, seed=1)


def begin(runtime: Runtime, tokenizer: Tokenizer, options: TrainOptions = OPTIONS) -> TrainingRun:
    # Whatever the CPU: in bfloat16 sums made in another order differ by more than what these tests bound.
    runtime = replace(runtime, compute_dtype=torch.float32)
    config = GPTConfig.from_depth(2, tokenizer.vocab_size, SEQUENCE_LEN)
    return resume.start_or_resume("base", options, runtime, tokenizer, config=config)


def losses(run: TrainingRun) -> list[float]:
    return [row["loss"] for row in read_steps(run.folder / "metrics.jsonl")]


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def save(
    tokenizer: Tokenizer, source: str = "base", tag: str = "d2", step: int = 1, keep_last: int = 9, keep_every: int = 0
) -> Checkpoint:
    model = random_model(tokenizer.vocab_size)
    meta = {"source": source, "tag": tag, "tokenizer": tokenizer.hash, "model_config": vars(model.config)}
    state = MuonAdamW(model, OptimizerOptions()).full_state()
    folder = paths.checkpoints_dir(source) / tag
    saved = checkpoint.write(folder, step, model.state_dict(), state, meta)
    checkpoint.prune(folder, keep_last, keep_every)
    return saved


class EvenLength(GradedTask):
    """Right if the reply has an even number of characters: about half of an untrained model's replies."""

    name = "even length"

    def __init__(self, grades: tuple[float, float] = (1.0, 0.0)) -> None:
        self.grades = grades

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Conversation:
        return conversation(f"Say something {index}.", "ok")

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        return self.grades[len("".join(part["text"] for part in reply if isinstance(part, dict))) % 2]


class Eventful:
    """Batches that call an event before a step, counted from 1."""

    def __init__(self, events: dict[int, Callable[[], object]]) -> None:
        self.events = events

    def step_data(self, step: int) -> StepData:
        self.events.get(step + 1, lambda: None)()
        return batches(FewRows()).step_data(step)


def steps_saved(tag: str) -> list[int]:
    return [c.step for c in checkpoint.checkpoints(paths.checkpoints_dir("base") / tag)]


class Stopping:
    """Batches during which a signal arrives."""

    def __init__(self, batches: BatchSource, at_step: int) -> None:
        self.batches, self.at_step = batches, at_step

    def step_data(self, step: int) -> StepData:
        if step == self.at_step:
            signal.raise_signal(signal.SIGTERM)
        return self.batches.step_data(step)
