"""Reinforcement learning on problems with checkable answers.

./rl.sh
"""

from dataclasses import dataclass, replace

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.eval.samples import answers
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tasks import mixtures
from nanochat.tokenizer import Tokenizer
from nanochat.train import agreement, resume
from nanochat.train.grpo import RolloutBatches
from nanochat.train.loop import train
from nanochat.train.memory import choose_device_batch_size
from nanochat.train.options import TrainOptions, check_not_compiled, check_range, inherit
from nanochat.train.run import rebuild_report


@dataclass
class RLOptions(TrainOptions):
    """Let the newest SFT model solve problems, and make what worked likelier."""

    mixture: mixtures.Choice = "real"
    """real: GSM8K; demo: sums and little stories"""
    num_iterations: int | None = 200
    init_lr_frac: float = 0.05
    warmdown_ratio: float = 1.0
    examples_per_step: int = 16
    """problems in one optimizer step, over all processes"""
    num_samples: int = 16
    """replies to each problem"""
    max_new_tokens: int = 256
    """tokens after which a reply is cut"""
    temperature: float = 1.0
    top_k: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_compiled(self)
        check_range("num_samples", self.num_samples, 2)  # a reply is compared with at least one other
        check_range("max_new_tokens", self.max_new_tokens, 1)


DEMO = RLOptions(
    mixture="demo", model_tag="d4", init_lr_frac=0.04, num_iterations=24, num_samples=8, max_new_tokens=48, save_every=0
)
QUICK = replace(DEMO, model_tag="d2", num_iterations=2, examples_per_step=8, num_samples=4, max_new_tokens=32)


def main(options: RLOptions) -> None:
    with Runtime.start(options.device_type) as runtime, Calculator() as calculator:
        agreement.check(agreement.CONVERSATIONS)
        if options.examples_per_step < runtime.world.size:
            raise UserError(
                f"--examples-per-step {options.examples_per_step} leaves processes idle: "
                f"the nearest that does not is {runtime.world.size}"
            )
        tokenizer = Tokenizer.load(paths.tokenizer_dir())
        parent = resume.parent_of("rl", options.model_tag, runtime, fresh=options.fresh)
        options = inherit(options, parent.meta["options"])
        run = resume.start_or_resume("rl", options, runtime, tokenizer, parent=parent)
        assert options.num_iterations
        own = -(-options.examples_per_step // runtime.world.size) * options.num_samples
        task = mixtures.rl(options.mixture)
        device_batch_size = choose_device_batch_size(run, max_rows=own)
        # Writing keeps far less of a token than learning does; --device-batch-size has to help all the same.
        at_once = min(own, 128, 16 * device_batch_size)
        batches = RolloutBatches(
            ChatModel("rl", run.tag, run.step, Engine(run.model, tokenizer, calculator, max_batch_size=at_once)),
            task,
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
            learns=f"{task.name}: {len(task):,} problems",
            step_size=f"{options.examples_per_step} problems, {options.num_samples} replies to each",
            fixed_tokens=None,
            samples=lambda: answers(run.model, tokenizer, calculator),
        )
        if runtime.world.is_main:
            rebuild_report(run.tag)


if __name__ == "__main__":
    cli.run(main, RLOptions, demo=DEMO, quick=QUICK)
