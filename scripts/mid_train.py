"""Midtraining: the base model learns the chat format, its identity, tool use and spelling.

./midtrain.sh
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import UseAppendAction

from nanochat import cli, paths
from nanochat.data.batches import RowBatches, rows_per_step
from nanochat.inference.chat import answers
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks.mixtures import conversation_rows, load_mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import FRACTION, FREE, INHERITED, Range, TrainOptions, inherit
from nanochat.train.run import rebuild_report


@dataclass
class MidtrainOptions(TrainOptions):
    """Train the newest base model on conversations, packed into rows, with a loss on every token."""

    add: Annotated[list[str], UseAppendAction, FREE] = field(default_factory=list)
    """FILE, FILE:2 (used twice), a folder, owner/name on the hub: more conversations; may be given several times"""
    only: Annotated[bool, FREE] = False
    """learn from --add alone, not from mixtures.yaml in the base directory"""
    warmdown_ratio: Annotated[float, FRACTION] = 0.8
    total_batch_size: Annotated[int | None, Range(1), INHERITED] = None
    """tokens per optimizer step, over all processes and micro-batches; default: as in pretraining"""
    num_epochs: Annotated[float, Range(0.01), FREE] = 1.0
    """epochs over the mixture, unless --num-iterations is given"""


DEMO = MidtrainOptions(init_lr_frac=0.7, save_every=0)
QUICK = replace(DEMO, num_iterations=12)


def main(options: MidtrainOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("mid", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        mixture = load_mixture("mid", options.add, only=options.only)
        agreement.check((), mixture.fingerprint)
        run = resume.start_or_resume("mid", options, runtime, tokenizer, parent=parent, data=mixture.fingerprint)
        sequence_len = run.model.config.sequence_len
        conversations = conversation_rows(mixture, tokenizer, sequence_len, runtime, learn_all=True, one_per_row=False)
        assert options.total_batch_size
        rows = rows_per_step(options.total_batch_size, sequence_len, runtime.world)
        batches = RowBatches(
            conversations,
            rows_per_step=rows,
            device_batch_size=choose_device_batch_size(run, max_rows=rows // runtime.world.size),
            world=runtime.world,
            seed=options.seed,
        )
        train(
            run,
            batches,
            options.num_iterations or max(1, round(options.num_epochs * len(conversations) / rows)),
            trained_on=str(mixture),
            step_size=f"{options.total_batch_size:,} tokens",
            fixed_tokens=options.total_batch_size,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        rebuild_report(run)


if __name__ == "__main__":
    cli.run(main, MidtrainOptions, demo=DEMO, quick=QUICK)
