"""Pretraining: predict the next token of plain text.

./pretrain.sh --depth 20
NPROC=8 ./pretrain.sh --depth 32 --device-batch-size 16
./pretrain.sh --from d20 --dataset ./mybooks --num-epochs 1
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace

from nanochat import cli, paths
from nanochat.data.batches import StreamRows, rows_per_step, text_batches
from nanochat.data.sources import MixedText
from nanochat.errors import UserError
from nanochat.eval.bits_per_byte import bits_per_byte
from nanochat.eval.samples import continuations
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.checkpoint import Checkpoint
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.optim import OptimizerOptions
from nanochat.train.options import ContinueOptions, PretrainOptions
from nanochat.train.run import Evaluation, rebuild_report
from nanochat.train.scaling import matrix_lr_factor, scale_options

DEMO = PretrainOptions(
    dataset=("encyclopedia",), depth=4, max_seq_len=256, total_batch_size=2048, num_iterations=420,
    matrix_lr=0.02, warmup_ratio=0.05, short_rows_ratio=0.0, eval_every=50, eval_tokens=8192, save_every=0,
)  # fmt: skip
QUICK = replace(DEMO, depth=2, total_batch_size=4096, num_iterations=20, eval_every=0)
DEMO_CONTINUED = ContinueOptions(total_batch_size=4096, eval_every=50, eval_tokens=8192, save_every=0)


def main(options: PretrainOptions) -> None:
    with Runtime.start(options.device_type) as runtime:
        agreement.check(agreement.TEXT)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        text = MixedText.open(options.dataset, "train", tokenizer)
        held_out = MixedText.open(options.dataset, "val", tokenizer, options.eval_tokens)
        options = replace(options, dataset=tuple(map(str, text.sources)))
        parent = resume.continued(options.from_, runtime) if options.from_ else None
        if parent:
            options = continue_model(options, parent, text)
        config = GPTConfig.from_depth(options.depth, tokenizer.vocab_size, options.max_seq_len)
        options = scale_options(options, config, runtime, len(text.stream.ids))
        data = f"{text.name}, {len(text.stream.ids):,} tokens"
        first_row = rows_read(parent) if parent and parent.meta["data"] == data else 0
        assert options.total_batch_size and options.num_iterations
        run = resume.start_or_resume(
            "base", options, runtime, tokenizer, parent=parent, config=config, data=data, first_row=first_row,
            matrix_lr=OptimizerOptions.matrix_lr * matrix_lr_factor(options.total_batch_size, options.num_iterations),
        )  # fmt: skip
        rows = rows_per_step(options.total_batch_size, config.sequence_len, runtime.world)
        device_batch_size = choose_device_batch_size(run, max_rows=rows // runtime.world.size)
        batches = text_batches(
            StreamRows(text.stream, config.sequence_len, tokenizer.bos_id),
            options.short_rows_ratio, options.num_iterations,
            rows_per_step=rows, device_batch_size=device_batch_size, world=runtime.world, seed=options.seed,
            first_row=run.first_row,
        )  # fmt: skip
        held_out_rows = StreamRows(held_out.stream, config.sequence_len, tokenizer.bos_id)

        def evaluate(check_stop: Callable[[], None]) -> dict[str, float]:
            tokens = options.eval_tokens
            bpb = bits_per_byte(run.model, tokenizer, held_out_rows, device_batch_size, tokens, runtime, check_stop)
            return {"bpb": bpb}

        trained_on = text.table(options.num_iterations * options.total_batch_size)
        if parent and not run.step:
            run.bpb_before = evaluate(lambda: None)["bpb"]
        if run.bpb_before:
            trained_on += f"\nbits per byte of the held-out text before training: {run.bpb_before:.3f}"
        if runtime.world.is_main:
            print(f"{trained_on}\n")
        short_rows = f", the first {batches.steps:,} in short rows" if batches.steps else ""
        train(
            run,
            batches,
            options.num_iterations,
            trained_on=trained_on,
            step_size=f"{options.total_batch_size:,} tokens{short_rows}",
            fixed_tokens=options.total_batch_size,
            samples=lambda: continuations(run.model, tokenizer),
            evaluation=Evaluation(options.eval_every, evaluate),
        )
        rebuild_report(run)


def rows_read(parent: Checkpoint) -> int:
    """Position in the order of the rows of text after the last one that `parent` was trained on."""
    tokens: int = parent.step * parent.meta["options"]["total_batch_size"]
    return int(parent.meta.get("first_row", 0)) + tokens // parent.config.sequence_len


def continue_model(options: PretrainOptions, parent: Checkpoint, text: MixedText) -> PretrainOptions:
    """Options to continue `parent` under another name. Raises UserError if the name is the same."""
    names = "-".join([parent.tag, *(source.name for source in text.sources)])
    tag = options.model_tag or re.sub(r"[^\w.+-]+", "-", names)
    if tag == parent.tag:
        raise UserError(f"--model-tag must differ from --from {parent.tag}, which is kept")
    config = parent.config
    return replace(options, depth=config.n_layer, max_seq_len=config.sequence_len, model_tag=tag)


if __name__ == "__main__":
    if any(argument.split("=")[0] == "--from" for argument in sys.argv):
        cli.run(main, ContinueOptions, demo=DEMO_CONTINUED)
    else:
        cli.run(main, PretrainOptions, demo=DEMO, quick=QUICK)
