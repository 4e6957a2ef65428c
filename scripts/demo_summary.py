"""The end of the demo: the table of stages, three answers, and what to type next.

./demo.sh
"""

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from nanochat import cli
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.units import format_duration
from scripts import chat_eval
from scripts.chat_eval import EvalOptions

PROMPTS = ("Who are you?", "What is 37 * 45?", "What is the Moon?")
NEXT = """\
Talk to it:            ./chat.sh --demo       (in the browser)
                       ./chat_cli.sh --demo   (in the terminal)
Who it says it is:     view_identity_data.py --demo shows it; edit it, then ./demo.sh again
The real thing:        ./prepare.sh && ./pretrain.sh, see README.md"""


@dataclass
class SummaryOptions(EvalOptions):
    """Show what the demo trained."""


def main(options: SummaryOptions) -> None:
    console = Console(highlight=False)
    chat_eval.main(options)
    stages = [found for source in STAGES if (found := checkpoint.newest(source, options.model_tag))]
    if len(stages) < len(STAGES):
        raise UserError("the demo is not finished: run ./demo.sh")
    console.print(
        f"{format_duration(sum(found.meta['seconds'] for found in stages))} of training, "
        f"{max(found.meta['peak_memory'] for found in stages) / 2**30:.1f} GiB of memory at most, "
        f"on {stages[-1].meta['machine']}\n"
    )
    chat = load_chat(model_tag=options.model_tag, device_type=options.device_type)
    for prompt in PROMPTS:
        console.print(f"[bold]{escape(prompt)}[/bold]")
        for line in answer(chat, prompt):
            console.print(f"  {line}")
    console.print(f"\nThese are the words of a model of {chat.engine.model.config.num_parameters / 1e6:.1f} million "
                  "parameters, trained for minutes.\n\n" + NEXT)  # fmt: skip


def answer(chat: ChatModel, prompt: str) -> list[str]:
    """The greedy reply, a line a part, as rich's markup; a tool call is shown as such."""
    tokens = chat.prompt([{"role": "user", "content": prompt}])
    (completion,) = chat.engine.generate([tokens], SamplingParams(max_tokens=100, temperature=0))
    shown = {"text": "{}", "python": "[dim]python: {}[/dim]", "python_output": "[dim]result: {}[/dim]"}
    return [
        shown[part["type"]].format(escape(part["text"].strip()))
        for part in reply_parts(chat.tokenizer, completion.tokens)
    ]


DEMO = SummaryOptions(**vars(chat_eval.DEMO))
QUICK = SummaryOptions(**vars(chat_eval.QUICK))

if __name__ == "__main__":
    cli.run(main, SummaryOptions, demo=DEMO, quick=QUICK)
