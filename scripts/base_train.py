"""Pretraining: predict the next token of plain text.

./pretrain.sh --depth 20
NPROC=8 ./pretrain.sh --depth 32 --device-batch-size 16
"""

from collections.abc import Callable
from dataclasses import replace

from nanochat import cli, paths
from nanochat.data.batches import StreamRows, rows_per_step, text_batches
from nanochat.data.token_files import TokenShards
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.samples import continuations
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import PretrainOptions
from nanochat.train.run import Evaluation, rebuild_report
from nanochat.train.scaling import scale_options

DEMO = PretrainOptions(
    dataset="encyclopedia", depth=4, max_seq_len=256, total_batch_size=4096, num_iterations=190,
    warmup_ratio=0.05, short_rows_ratio=0.0, eval_every=50, eval_tokens=8192, save_every=0,
)  # fmt: skip
QUICK = replace(DEMO, depth=2, num_iterations=20, eval_every=0)


def main(options: PretrainOptions) -> None:
    with Runtime.start(options.device_type) as runtime:
        agreement.check(agreement.TEXT)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        config = GPTConfig.from_depth(options.depth, tokenizer.vocab_size, options.max_seq_len)
        text, held_out = (
            StreamRows(
                TokenShards.open(paths.tokens_dir(options.dataset), split, tokenizer),
                config.sequence_len,
                tokenizer.bos_id,
            )
            for split in ("train", "val")
        )
        options = scale_options(options, config, runtime)
        data = f"{options.dataset}, {len(text.stream.ids):,} tokens"
        run = resume.start_or_resume("base", options, runtime, tokenizer, config=config, data=data)
        assert options.total_batch_size and options.num_iterations
        rows = rows_per_step(options.total_batch_size, config.sequence_len, runtime.world)
        device_batch_size = choose_device_batch_size(run, max_rows=rows // runtime.world.size)
        batches = text_batches(
            text, options.short_rows_ratio, options.num_iterations,
            rows_per_step=rows, device_batch_size=device_batch_size, world=runtime.world, seed=options.seed,
        )  # fmt: skip

        def evaluate(check_stop: Callable[[], None]) -> dict[str, float]:
            tokens = options.eval_tokens
            bpb = bits_per_byte(run.model, tokenizer, held_out, device_batch_size, tokens, runtime, check_stop)
            return {"bpb": bpb}

        short_rows = f", the first {batches.steps:,} in short rows" if batches.steps else ""
        train(
            run,
            batches,
            options.num_iterations,
            trained_on=data,
            step_size=f"{options.total_batch_size:,} tokens{short_rows}",
            fixed_tokens=options.total_batch_size,
            samples=lambda: continuations(run.model, tokenizer),
            evaluation=Evaluation(options.eval_every, evaluate),
        )
        rebuild_report(run)


if __name__ == "__main__":
    cli.run(main, PretrainOptions, demo=DEMO, quick=QUICK)
