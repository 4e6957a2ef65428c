"""Pretraining: the next token of plain text.

./pretrain.sh --depth 20
NPROC=8 ./pretrain.sh --depth 32 --device-batch-size 16
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanochat import cli, paths
from nanochat.data.batches import rows_per_step, text_batches
from nanochat.data.packing import StreamRows
from nanochat.data.token_shards import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.samples import continuations
from nanochat.model.gpt import GPTConfig
from nanochat.report import build
from nanochat.runtime import Runtime, fast_rows
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, batch_size, resume
from nanochat.train.loop import Evaluation
from nanochat.train.options import TrainOptions, check_range

REFERENCE_TOKENS, REFERENCE_BATCH, SMALLEST_BATCH = 11.2e9, 524_288, 4096


@dataclass
class PretrainOptions(TrainOptions):
    """Train a base model on text. --depth decides the rest; every other option overrides what follows from it."""

    depth: int = 20
    """layers; width is 64 times as much"""
    max_seq_len: int = 2048
    """context in tokens"""
    dataset: str = "fineweb-edu"
    """text prepared by prepare.sh"""
    total_batch_size: int | None = None
    """tokens in one optimizer step, over all processes and micro-batches; by default it follows from depth"""
    target_param_data_ratio: float = 20.0
    """tokens to train on for each parameter (Chinchilla: 20), unless --num-iterations is given"""
    short_rows_ratio: float = 0.6
    """share of the steps, the first ones, whose rows are a quarter of the context"""
    warmdown_ratio: float = 0.5
    eval_every: int = 250
    """steps between validations; 0: at the end only"""
    eval_tokens: int = 10_485_760
    """tokens of held-out text to validate on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("short_rows_ratio", self.short_rows_ratio, 0, 1)
        check_range("eval_every", self.eval_every, 0)
        check_range("eval_tokens", self.eval_tokens, 1)
        check_range("target_param_data_ratio", self.target_param_data_ratio, 0.01)


DEMO = PretrainOptions(
    dataset="encyclopedia", depth=4, max_seq_len=256, total_batch_size=4096, num_iterations=190,
    warmup_ratio=0.05, short_rows_ratio=0.0, eval_every=50, eval_tokens=8192, save_every=0,
)  # fmt: skip
QUICK = replace(DEMO, depth=2, num_iterations=20, eval_every=0)


def main(options: PretrainOptions) -> None:
    with Runtime.start(options.device_type, agreement.TEXT) as runtime:
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        config = GPTConfig.from_depth(options.depth, tokenizer.vocab_size, options.max_seq_len)
        folder = paths.tokens_dir(options.dataset)
        rows = StreamRows(TokenShards.open(folder, "train", tokenizer), config.sequence_len, tokenizer.bos_id)
        held_out = StreamRows(TokenShards.open(folder, "val", tokenizer), config.sequence_len, tokenizer.bos_id)
        options = with_defaults(options, config, runtime)
        data = f"{options.dataset}, {rows.num_tokens:,} tokens"
        run = resume.begin("base", options, runtime, tokenizer, config=config, data=data)
        assert options.total_batch_size and options.num_iterations
        in_a_step = rows_per_step(options.total_batch_size, config.sequence_len, runtime.share)
        device_batch_size = batch_size.choose(run, most_rows=in_a_step // runtime.share.world_size)
        batches = text_batches(
            rows, options.short_rows_ratio, options.num_iterations,
            rows_per_step=in_a_step, device_batch_size=device_batch_size, share=runtime.share, seed=options.seed,
        )  # fmt: skip
        short_rows = f", the first {batches.steps:,} in short rows" if batches.steps else ""

        def evaluate(leave_if_asked: Callable[[], None]) -> dict[str, float]:
            bpb = bits_per_byte(
                run.model, tokenizer, held_out, device_batch_size, options.eval_tokens, runtime, leave_if_asked
            )
            return {"bpb": bpb}

        run.run(
            batches,
            options.num_iterations,
            learns=data,
            step_size=f"{options.total_batch_size:,} tokens{short_rows}",
            fixed_tokens=options.total_batch_size,
            samples=lambda: continuations(run.model, tokenizer),
            evaluation=Evaluation(options.eval_every, evaluate),
        )
        if runtime.is_main:
            build.rebuild(run.tag)


def with_defaults(options: PretrainOptions, config: GPTConfig, runtime: Runtime) -> PretrainOptions:
    """Fill in what follows from depth: tokens from the parameters, the batch from the tokens."""
    tokens = options.target_param_data_ratio * config.num_parameters
    total = options.total_batch_size or default_batch_size(tokens, config.sequence_len * runtime.share.world_size)
    rows = options.device_batch_size or fast_rows(config.sequence_len, runtime.device, runtime.compute_dtype)
    return replace(
        options,
        total_batch_size=total,
        device_batch_size=rows,
        num_iterations=options.num_iterations or max(1, round(tokens / total)),
    )


def default_batch_size(tokens: float, unit: int) -> int:
    """Tokens in a step of a training on so many: a power of two, as a multiple of `unit`.

    It goes through two ends: the 4,096 that was measured to be best at 0.8 to 1.6 million tokens (docs/experiments.md)
    and nanochat's 524,288 at d20's 11.2 billion. Among larger models alone, https://arxiv.org/abs/2505.13738 finds an
    exponent of 0.38.
    """
    ideal = max(SMALLEST_BATCH, REFERENCE_BATCH * (tokens / REFERENCE_TOKENS) ** 0.6)
    return max(1, round(2 ** round(math.log2(ideal)) / unit)) * unit


if __name__ == "__main__":
    cli.run(main, PretrainOptions, demo=DEMO, quick=QUICK)
