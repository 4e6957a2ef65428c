"""Train a model for a number of steps on prepared text and measure it on held-out text: what comparisons repeat."""

import sys
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from nanochat import paths
from nanochat.data.batches import text_batches
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.gradients import StepGradients
from nanochat.train.optim import MuonAdamW
from nanochat.train.options import TrainOptions
from nanochat.train.scaling import lr_multiplier

Model = TypeVar("Model", bound=GPT)

EVAL_ROWS = 8
"""rows in a forward pass without gradients"""


@dataclass(frozen=True)
class Text:
    """What ./prepare.sh made, as rows."""

    tokenizer: Tokenizer
    train: StreamRows
    held_out: StreamRows

    @classmethod
    def open(cls, dataset: str, sequence_len: int) -> "Text":
        """Raises UserError if it is not there."""
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        train, held_out = (
            StreamRows(TokenShards.open(paths.tokens_dir(dataset), split, tokenizer), sequence_len, tokenizer.bos_id)
            for split in ("train", "val")
        )
        return cls(tokenizer, train, held_out)


class Training(Generic[Model]):
    """One model on its way. `schedule` gives the learning rate's warm-up and warm-down, and the gradient's clipping."""

    def __init__(
        self, model: Model, optimizer: MuonAdamW, text: Text, schedule: TrainOptions, *,
        total_batch_size: int, num_iterations: int, device_batch_size: int, seed: int, runtime: Runtime,
        short_rows_ratio: float = 0.0,
    ) -> None:  # fmt: skip
        """`total_batch_size`: tokens a step; `seed`: of the order of the rows."""
        self.model = model
        self.optimizer = optimizer
        self.text = text
        self.schedule = schedule
        self.total_batch_size = total_batch_size
        self.num_iterations = num_iterations
        self.runtime = runtime
        self.gradients = StepGradients(model, optimizer, runtime, schedule.grad_clip)
        self.batches = text_batches(
            text.train, short_rows_ratio, num_iterations,
            rows_per_step=total_batch_size // text.train.sequence_len,
            device_batch_size=device_batch_size, world=runtime.world, seed=seed,
        )  # fmt: skip
        self.seconds = 0.0
        """spent in `train`"""

    def train(self, until: int) -> None:
        """Steps until `until` are taken in all; their time counts."""
        begun = time.perf_counter()
        for step in range(self.optimizer.steps, until):
            self.gradients.compute(self.batches.step_data(step).batches, sys.maxsize)
            self.optimizer.step(lr_multiplier(step, self.num_iterations, self.schedule))
        self.runtime.synchronize()
        self.seconds += time.perf_counter() - begun

    def bpb(self, tokens: int) -> float:
        """Bits per byte of the first `tokens` held-out tokens."""
        return bits_per_byte(self.model, self.text.tokenizer, self.text.held_out, EVAL_ROWS, tokens, self.runtime)
