"""Supervised fine-tuning: one conversation per row, with a loss on the assistant's tokens only.

./sft.sh
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import UseAppendAction

from nanochat import cli, paths
from nanochat.data.packing import TrimmedBatches
from nanochat.inference.chat import answers
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks.mixtures import conversation_rows, load_mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import FRACTION, FREE, Range, TrainOptions, check_not_compiled, inherit
from nanochat.train.run import rebuild_report


@dataclass
class SFTOptions(TrainOptions):
    """Train the newest midtrained model on fewer, better conversations."""

    add: Annotated[list[str], UseAppendAction, FREE] = field(default_factory=list)
    """FILE, FILE:2 (used twice), a folder, owner/name on the hub: more conversations; may be given several times"""
    only: Annotated[bool, FREE] = False
    """learn from --add alone, not from mixtures.yaml in the base directory"""
    warmdown_ratio: Annotated[float, FRACTION] = 1.0
    init_lr_frac: Annotated[float, Range(0)] = 0.3
    num_epochs: Annotated[float, Range(0.01), FREE] = 1.0
    """epochs over the mixture, unless --num-iterations is given"""
    target_examples_per_step: Annotated[int, Range(1)] = 32
    """conversations per optimizer step"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_compiled(self)


DEMO = SFTOptions(init_lr_frac=0.4, target_examples_per_step=64, save_every=0)
QUICK = replace(DEMO, num_iterations=8)


def main(options: SFTOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("sft", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        mixture = load_mixture("sft", options.add, only=options.only)
        agreement.check((), mixture.fingerprint)
        run = resume.start_or_resume("sft", options, runtime, tokenizer, parent=parent, data=mixture.fingerprint)
        sequence_len = run.model.config.sequence_len
        conversations = conversation_rows(mixture, tokenizer, sequence_len, runtime, learn_all=False, one_per_row=True)
        rows = options.target_examples_per_step
        batches = TrimmedBatches(
            conversations,
            rows_per_step=rows,
            device_batch_size=choose_device_batch_size(run, max_rows=-(-rows // runtime.world.size)),
            world=runtime.world,
            seed=options.seed,
        )
        train(
            run,
            batches,
            options.num_iterations or max(1, round(options.num_epochs * len(conversations) / rows)),
            trained_on=str(mixture),
            step_size=f"{rows} conversations",
            fixed_tokens=None,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        rebuild_report(run)


if __name__ == "__main__":
    cli.run(main, SFTOptions, demo=DEMO, quick=QUICK)
