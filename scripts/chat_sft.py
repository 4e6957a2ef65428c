"""Supervised fine-tuning: one conversation a row, and only what the assistant says is learned.

./sft.sh
"""

from dataclasses import dataclass, replace

from nanochat import cli, paths
from nanochat.data.batches import RowBatches
from nanochat.eval.samples import answers
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks import mixtures
from nanochat.tasks.mixtures import conversation_rows
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import TrainOptions, check_not_compiled, check_range, inherit
from nanochat.train.run import rebuild_report


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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_compiled(self)
        check_range("num_epochs", self.num_epochs, 0.01)
        check_range("target_examples_per_step", self.target_examples_per_step, 1)


DEMO = SFTOptions(mixture="demo", model_tag="d4", init_lr_frac=0.4, target_examples_per_step=64, save_every=0)
QUICK = replace(DEMO, model_tag="d2", num_iterations=8)


def main(options: SFTOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("sft", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        mixture = mixtures.sft(options.mixture)
        run = resume.start_or_resume("sft", options, runtime, tokenizer, parent=parent, data=mixture.fingerprint)
        sequence_len = run.model.config.sequence_len
        rows = conversation_rows(mixture, tokenizer, sequence_len, runtime, learn_all=False, one_per_row=True)
        device_batch_size = choose_device_batch_size(
            run, max_rows=-(-options.target_examples_per_step // runtime.world.size)
        )
        batches = RowBatches(
            rows,
            rows_per_step=options.target_examples_per_step,
            device_batch_size=device_batch_size,
            world=runtime.world,
            seed=options.seed,
            trim=True,
        )
        steps = max(1, round(options.num_epochs * len(rows) / options.target_examples_per_step))
        train(
            run,
            batches,
            options.num_iterations or steps,
            learns=str(mixture),
            step_size=f"{options.target_examples_per_step} conversations",
            fixed_tokens=None,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        if runtime.world.is_main:
            rebuild_report(run.tag)


if __name__ == "__main__":
    cli.run(main, SFTOptions, demo=DEMO, quick=QUICK)
