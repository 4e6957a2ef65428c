"""End of the demo: training time and memory, three replies, and the commands to try next.

python -m scripts.demo_summary --demo
"""

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from nanochat import cli
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.stages import STAGES
from nanochat.train import checkpoint
from nanochat.units import format_duration, format_gib

PROMPTS = {
    "Questions that the model of the full demo answers:": ("Who are you?", "What is 37 * 45?"),
    "A question that no model of this size answers, because facts need a larger one:": ("What is the Moon?",),
}
NEXT = """\
Chat:                  ./chat.sh --demo       (in the browser)
                       ./chat_cli.sh --demo   (in the terminal)
Change its identity:   ./view_identity_data.py --demo, edit the file, ./demo.sh
A real model:          ./prepare.sh && ./pretrain.sh, see README.md"""


@dataclass
class SummaryOptions:
    """Summarize the demo."""

    model_tag: str = "d4"
    device_type: str = "auto"


def main(options: SummaryOptions) -> None:
    console = Console(highlight=False)
    stages = [found for source in STAGES if (found := checkpoint.newest(source, options.model_tag))]
    if len(stages) < len(STAGES):
        raise UserError("the demo is not finished: run ./demo.sh")
    console.print(
        f"{format_duration(sum(found.meta['seconds'] for found in stages))} of training, "
        f"at most {format_gib(max(found.meta['peak_memory'] for found in stages))} of memory, "
        f"on {stages[-1].meta['machine']}\n"
    )
    chat = load_chat(stages[-1], options.device_type)
    for heading, prompts in PROMPTS.items():
        console.print(heading)
        for prompt in prompts:
            console.print(f"  [bold]{escape(prompt)}[/bold]")
            for line in answer(chat, prompt):
                console.print(Padding(line, (0, 0, 0, 4)))
    console.print(f"\nThis model has {chat.engine.model.config.num_parameters / 1e6:.1f} million parameters and was "
                  "trained for minutes.\n\n" + NEXT)  # fmt: skip


def answer(chat: ChatModel, prompt: str) -> list[str]:
    """The greedy reply as rich markup, one line per part: text, tool call or tool result."""
    tokens = chat.prompt([{"role": "user", "content": prompt}])
    (completion,) = chat.engine.generate([tokens], SamplingParams(max_tokens=100, temperature=0))
    formats = {"text": "{}", "python": "[dim]python: {}[/dim]", "python_output": "[dim]result: {}[/dim]"}
    return [
        formats[part["type"]].format(escape(part["text"].strip()))
        for part in reply_parts(chat.tokenizer, completion.tokens)
    ]


if __name__ == "__main__":
    cli.run(main, SummaryOptions, demo=SummaryOptions())
