"""Supervised fine-tuning: one conversation a row, and only what the assistant says is learned.

./sft.sh
"""

from dataclasses import dataclass, replace

from nanochat import cli, paths, trainer
from nanochat.data.batches import RowBatches
from nanochat.data.conversation_rows import conversation_rows
from nanochat.options import TrainOptions, inherit
from nanochat.runtime import Runtime
from nanochat.tasks import mixtures
from nanochat.tokenizer import Tokenizer


@dataclass
class SFTOptions(TrainOptions):
    """Train the newest midtrained model on fewer and better conversations."""

    mixture: mixtures.Choice = "real"
    """real: ARC, GSM8K, SmolTalk and more, as prepare.sh fetched them; demo: what comes with the installation"""
    warmdown_ratio: float = 1.0
    init_lr_frac: float = 0.02
    num_epochs: float = 1.0
    """times through the mixture, unless --num-iterations is given"""
    target_examples_per_step: int = 32
    """conversations in one optimizer step"""


DEMO = SFTOptions(mixture="demo", init_lr_frac=0.25, target_examples_per_step=64, save_every=0)
QUICK = replace(DEMO, num_iterations=10)


def main(options: SFTOptions) -> None:
    with Runtime.start(options.device_type) as runtime:
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = trainer.parent_of("sft", options.model_tag)
        options = inherit(options, parent.meta["options"])
        run = trainer.begin("sft", options, runtime, tokenizer, parent=parent)
        mixture = mixtures.sft(options.mixture)
        sequence_len = run.model.config.sequence_len
        rows = conversation_rows(mixture, tokenizer, sequence_len, runtime, learn_all=False, one_per_row=True)
        assert options.device_batch_size
        batches = RowBatches(
            rows,
            rows_per_step=options.target_examples_per_step,
            device_batch_size=options.device_batch_size,
            share=runtime.share,
            seed=options.seed,
            trim=True,
        )
        steps = max(1, round(options.num_epochs * len(rows) / options.target_examples_per_step))
        run.run(batches, options.num_iterations or steps)


if __name__ == "__main__":
    cli.run(main, SFTOptions, demo=DEMO, quick=QUICK)
