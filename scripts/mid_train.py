"""Midtraining: the base model learns the chat format, who it is, its tool, and to spell.

./midtrain.sh
"""

from dataclasses import dataclass, replace

from nanochat import cli, paths
from nanochat.data.batches import RowBatches, rows_per_step
from nanochat.eval.samples import answers
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks import mixtures
from nanochat.tasks.mixtures import conversation_rows
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import TrainOptions, check_range, inherit
from nanochat.train.run import rebuild_report


@dataclass
class MidtrainOptions(TrainOptions):
    """Train the newest base model on conversations, packed side by side; every token is learned."""

    mixture: mixtures.Choice = "real"
    """real: SmolTalk, MMLU, GSM8K and more, as prepare.sh fetched them; demo: what comes with the installation"""
    warmdown_ratio: float = 0.8
    total_batch_size: int | None = None
    """tokens in one optimizer step, over all processes and micro-batches; by default as in pretraining"""
    num_epochs: float = 1.0
    """times through the mixture, unless --num-iterations is given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_epochs", self.num_epochs, 0.01)


DEMO = MidtrainOptions(mixture="demo", model_tag="d4", init_lr_frac=0.7, save_every=0)
QUICK = replace(DEMO, model_tag="d2", num_iterations=12)


def main(options: MidtrainOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("mid", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        mixture = mixtures.mid(options.mixture)
        run = resume.start_or_resume("mid", options, runtime, tokenizer, parent=parent, data=mixture.fingerprint)
        sequence_len = run.model.config.sequence_len
        rows = conversation_rows(mixture, tokenizer, sequence_len, runtime, learn_all=True, one_per_row=False)
        assert options.total_batch_size
        in_a_step = rows_per_step(options.total_batch_size, sequence_len, runtime.world)
        device_batch_size = choose_device_batch_size(run, max_rows=in_a_step // runtime.world.size)
        batches = RowBatches(
            rows,
            rows_per_step=in_a_step,
            device_batch_size=device_batch_size,
            world=runtime.world,
            seed=options.seed,
        )
        steps = options.num_iterations or max(1, round(options.num_epochs * len(rows) / in_a_step))
        train(
            run,
            batches,
            steps,
            learns=str(mixture),
            step_size=f"{options.total_batch_size:,} tokens",
            fixed_tokens=options.total_batch_size,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        if runtime.world.is_main:
            rebuild_report(run.tag)


if __name__ == "__main__":
    cli.run(main, MidtrainOptions, demo=DEMO, quick=QUICK)
