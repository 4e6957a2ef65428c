"""Talk to a model in the terminal: `./chat_cli.sh`, or python -m scripts.chat_cli -p "Who are you?" for one answer."""

import secrets
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.inference.sampling_params import CHAT_SAMPLING, SamplingParams
from nanochat.serve.model_registry import ModelCard, ModelRegistry, trained_models
from nanochat.serve.terminal import TerminalChat, answer_once, keyboard
from nanochat.train import checkpoint


@dataclass
class Options:
    """Talk to the model in the terminal."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """print one answer to this text and end; -: the text comes from stdin"""
    json: bool = False
    """with -p: the answer and its figures as one line of JSON"""
    system: str | None = None
    """tells the model how to behave"""
    source: str | None = None
    """base, mid, sft or rl; by default the most advanced there is"""
    model_tag: str | None = None
    """such as d20; by default the newest"""
    step: int | None = None
    """by default the last"""
    temperature: float = CHAT_SAMPLING.temperature
    """0 always takes the likeliest token"""
    top_k: int = CHAT_SAMPLING.top_k or 0
    """sample among this many tokens; 0 for all"""
    max_tokens: int = CHAT_SAMPLING.max_tokens
    """longest reply"""
    seed: int | None = None
    """of the one answer that -p prints; by default another each time"""
    device_type: str = "auto"
    """auto, cuda or cpu"""


DEMO = Options(temperature=0.3)  # a model of few parameters is only sure of little


def main(options: Options) -> None:
    def load(card: ModelCard) -> ChatModel:
        return load_chat(card.source, card.model_tag, card.step, options.device_type, max_batch_size=1)

    if options.json and options.prompt is None:
        raise UserError("--json prints one answer: pass the question with -p TEXT, or -p - to read it from stdin")
    read = keyboard(paths.base_dir() / "chat_history") if options.prompt is None else None
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if options.prompt == "-" else options.prompt or ""
    if read is None and not prompt.strip():
        raise UserError("there is no question: pass it with -p TEXT, or -p - to read it from stdin")
    card = ModelCard.of(checkpoint.find(options.source, options.model_tag, options.step))
    sampling = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        seed=secrets.randbits(31) if options.seed is None else options.seed,
    )
    if read is None:
        if not options.json:
            print(f"({card.description})", file=sys.stderr)  # stdout holds the answer alone
        answer_once(load(card), prompt, sampling, options.system, options.json)
    else:
        TerminalChat(
            ModelRegistry(card, trained_models), load, sampling, read, Console(highlight=False), options.system
        ).run()


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
