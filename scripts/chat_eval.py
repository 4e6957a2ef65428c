"""The table of what each stage taught.

./eval.sh --source sft
"""

from dataclasses import dataclass, replace

from rich.console import Console

from nanochat import checkpoint, cli, paths
from nanochat.errors import UserError
from nanochat.eval.stages import Effort, measure, table
from nanochat.options import check_range
from nanochat.runtime import Runtime


@dataclass
class EvalOptions:
    """Measure the stages: bits per byte, identity, arithmetic with the tool, spelling. Results are kept."""

    source: str = "all"
    """base, mid, sft, rl or all there are"""
    model_tag: str | None = None
    """which model; by default the newest"""
    step: int | None = None
    """which checkpoint; by default the last"""
    dataset: str = "fineweb-edu"
    """text for bits per byte"""
    eval_tokens: int = 10_485_760
    """tokens of it, at most"""
    max_problems: int = 500
    """held-out sums; a fifth as many words to spell and to count letters of"""
    device_batch_size: int = 32
    """rows of text, or replies, at a time"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        check_range("max_problems", self.max_problems, 5)
        check_range("eval_tokens", self.eval_tokens, 1)
        check_range("device_batch_size", self.device_batch_size, 1)


DEMO = EvalOptions(dataset="encyclopedia", model_tag="d4", device_batch_size=128)
QUICK = replace(DEMO, model_tag="d2", max_problems=50)


def main(options: EvalOptions) -> None:
    console = Console()
    effort = Effort(options.dataset, options.eval_tokens, options.max_problems)
    sources = [options.source]
    if options.source == "all":
        sources = [s for s in paths.CHECKPOINT_FOLDERS if checkpoint.newest(s, options.model_tag, options.step)]
    if not sources:
        raise UserError(f"there is no checkpoint in {paths.base_dir()}: run ./pretrain.sh first")
    with Runtime.start(options.device_type) as runtime:
        results = []
        for source in sources:
            found = checkpoint.find(source, options.model_tag, options.step)
            with console.status(f"measuring {found.describe()}"):
                results.append(measure(found, effort, runtime, options.device_batch_size))
    console.print(table(results))


if __name__ == "__main__":
    cli.run(main, EvalOptions, demo=DEMO, quick=QUICK)
