"""Chat in the terminal: `./chat_cli.sh`, or python -m scripts.chat_cli -p "Who are you?" for one answer."""

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
    """Chat with the model in the terminal."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """print one answer to this prompt and exit; -: read the prompt from stdin"""
    json: bool = False
    """with -p: print the answer and its statistics as one line of JSON"""
    system: str | None = None
    """system message"""
    source: str | None = None
    """base, mid, sft or rl; default: the most advanced stage"""
    model_tag: str | None = None
    """model, such as d20; default: the newest"""
    step: int | None = None
    """checkpoint; default: the last"""
    temperature: float = CHAT_SAMPLING.temperature
    """0 is greedy"""
    top_k: int = CHAT_SAMPLING.top_k or 0
    """sample from this many most likely tokens; 0: all"""
    max_tokens: int = CHAT_SAMPLING.max_tokens
    """maximum length of the reply"""
    seed: int | None = None
    """seed of the answer that -p prints; default: random"""
    device_type: str = "auto"
    """auto, cuda or cpu"""


DEMO = Options(temperature=0.3)  # small models need a low temperature


def main(options: Options) -> None:
    def load(card: ModelCard) -> ChatModel:
        found = checkpoint.find(card.source, card.model_tag, card.step)
        return load_chat(found, options.device_type, max_batch_size=1)

    if options.json and options.prompt is None:
        raise UserError("--json requires -p TEXT, or -p - to read the question from stdin")
    read = keyboard(paths.base_dir() / "chat_history") if options.prompt is None else None
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if options.prompt == "-" else options.prompt or ""
    if read is None and not prompt.strip():
        raise UserError("the prompt is empty: pass -p TEXT, or -p - to read it from stdin")
    card = ModelCard.from_checkpoint(checkpoint.find(options.source, options.model_tag, options.step))
    sampling = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        seed=secrets.randbits(31) if options.seed is None else options.seed,
    )
    if read is None:
        if not options.json:
            print(f"({card.description})", file=sys.stderr)  # only the answer goes to stdout
        answer_once(load(card), prompt, sampling, options.system, options.json)
    else:
        TerminalChat(
            ModelRegistry(card, trained_models), load, sampling, read, Console(highlight=False), options.system
        ).run()


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
