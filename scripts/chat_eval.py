"""The table of what each stage taught.

./eval.sh --source sft
"""

from dataclasses import dataclass, replace

from rich.console import Console

from nanochat import checkpoint, cli, paths
from nanochat.errors import UserError
from nanochat.eval import stages
from nanochat.inference.chat import load_chat
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
    max_problems: int = 500
    """held-out sums; a fifth as many words to spell and to count letters of"""
    device_batch_size: int = 32
    """rows of text, or replies, at a time"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        check_range("max_problems", self.max_problems, 5)
        check_range("device_batch_size", self.device_batch_size, 1)


DEMO = EvalOptions(dataset="encyclopedia", model_tag="d4", device_batch_size=128)
QUICK = replace(DEMO, model_tag="d2", max_problems=50)


def main(options: EvalOptions) -> None:
    console = Console()
    with Runtime.start(options.device_type) as runtime:
        results = []
        for source in paths.CHECKPOINT_FOLDERS if options.source == "all" else [options.source]:
            if options.source == "all" and not checkpoint.newest(source, options.model_tag, options.step):
                continue
            found = checkpoint.find(source, options.model_tag, options.step)
            result = stages.load_result(found, options.max_problems)
            if result is None:
                with console.status(f"measuring {found.describe()}"):
                    chat = load_chat(source, found.tag, found.step, options.device_type, options.device_batch_size)
                    result = stages.evaluate_stage(
                        found, chat, runtime, options.dataset, options.device_batch_size, options.max_problems
                    )
                stages.save_result(found, result, options.max_problems)
            results.append(result)
        if not results:
            raise UserError(f"there is no checkpoint in {paths.base_dir()}: run ./pretrain.sh first")
        console.print(stages.table(results))


if __name__ == "__main__":
    cli.run(main, EvalOptions, demo=DEMO, quick=QUICK)
