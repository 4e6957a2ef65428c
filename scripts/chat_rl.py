"""Reinforcement learning on problems with verifiable answers.

./rl.sh
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import UseAppendAction

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel, answers
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks.mixtures import load_mixture
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.grpo import RolloutBatches
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import FRACTION, FREE, Range, TrainOptions, check_not_compiled, inherit
from nanochat.train.run import rebuild_report

MAX_CONCURRENT_REPLIES = 128


@dataclass
class RLOptions(TrainOptions):
    """Train the newest SFT model by reinforcement: it solves problems, and correct replies are rewarded."""

    task: Annotated[list[str], UseAppendAction, FREE] = field(default_factory=list)
    """FILE, FILE:2, a folder or a .py file: problems instead of those in mixtures.yaml; may be given several times"""
    num_iterations: Annotated[int | None, Range(1), FREE] = 200
    init_lr_frac: Annotated[float, Range(0)] = 0.05
    warmdown_ratio: Annotated[float, FRACTION] = 1.0
    examples_per_step: Annotated[int, Range(1)] = 16
    """problems per optimizer step, over all processes"""
    num_samples: Annotated[int, Range(2)] = 16
    """replies per problem"""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """maximum number of tokens per reply"""
    temperature: float = 1.0
    top_k: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_compiled(self)


DEMO = RLOptions(
    init_lr_frac=0.08, num_iterations=24, examples_per_step=64, num_samples=4, max_new_tokens=48, save_every=0
)
QUICK = replace(DEMO, num_iterations=2, examples_per_step=8, max_new_tokens=32)


def main(options: RLOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        if options.examples_per_step < runtime.world.size:
            raise UserError(
                f"--examples-per-step must be at least {runtime.world.size}, the number of processes, got "
                f"{options.examples_per_step}"
            )
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("rl", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        mixture = load_mixture("rl", options.task, only=bool(options.task))
        agreement.check((), mixture.fingerprint)
        run = resume.start_or_resume("rl", options, runtime, tokenizer, parent=parent, data=mixture.fingerprint)
        if runtime.world.is_main:
            print(f"{mixture}\n")
        assert options.num_iterations
        replies = -(-options.examples_per_step // runtime.world.size) * options.num_samples
        device_batch_size = choose_device_batch_size(run, max_rows=replies)
        # --device-batch-size also limits generation, although it needs far less memory per token than training.
        concurrent = min(replies, MAX_CONCURRENT_REPLIES, 16 * device_batch_size)
        engine = Engine(run.model, tokenizer, calculator, max_batch_size=concurrent)
        chat = ChatModel("rl", engine)
        room = min(options.max_new_tokens, chat.context // 2)
        too_long = sum(len(chat.prompt(row["messages"][:-1])) > chat.context - room for row in mixture)
        if too_long and runtime.world.is_main:
            print(
                f"note: {too_long:,} of {len(mixture):,} questions lose their start: they are longer than "
                f"{chat.context - room:,} tokens, the context without room for the reply\n"
            )
        batches = RolloutBatches(
            chat,
            mixture,
            runtime,
            problems_per_step=options.examples_per_step,
            samples_per_problem=options.num_samples,
            device_batch_size=device_batch_size,
            sampling=SamplingParams(options.max_new_tokens, options.temperature, options.top_k, options.seed),
        )
        train(
            run,
            batches,
            options.num_iterations,
            trained_on=str(mixture),
            step_size=f"{options.examples_per_step} problems with {options.num_samples} replies each",
            fixed_tokens=None,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        rebuild_report(run)


if __name__ == "__main__":
    cli.run(main, RLOptions, demo=DEMO, quick=QUICK)
