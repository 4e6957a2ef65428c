"""Compare the greedy replies of another program with those of this project's engine, on 50 conversations.

./hf_prepare.sh --author ada --gguf f32
llama-server -m hf_models/MODEL/MODEL-f32.gguf --port 8080
python -m benchmarks.greedy_replies --folder hf_models/MODEL --port 8080    # without --port: transformers

Texts are compared without special tokens. A reply that calls the python tool is compared up to the end of the call,
where this project runs the tool and other programs do not.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat import cli
from nanochat.conversations import Message
from nanochat.errors import UserError
from nanochat.hub.import_model import read_model
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tokenizer import SPECIAL_TOKENS

QUESTIONS = (
    *("Who are you?", "Who made you?", "What is your name?", "Are you a person?", "Hello!", "What can you do?"),
    *("How old are you?", "Good morning, how are you?", "Can you help me?"),
    "Tell me something about yourself.",  # words:ignore
    *(
        f"What is {sum}?"
        for sum in ("3 + 4", "12 + 7", "25 - 9", "6 * 7", "81 / 9", "100 + 250", "47 - 18", "2026 + 1")
    ),
    *(
        f"How many letters are in the word {word}?"
        for word in ("strawberry", "letter", "mississippi", "banana", "moon")
    ),
    *(f"Spell the word {word}." for word in ("river", "apple", "window", "garden", "planet")),
    *(f"What is {thing}?" for thing in ("the capital of France", "water", "a computer", "the largest planet", "music")),
    *("Why is the sky blue?", "Name three animals.", "Who was Albert Einstein?", "Where do whales live?"),
    *("Explain what a volcano is.", "Write a short poem about the sea.", "How does a bird fly?", "Was ist ein Baum?"),
    *("¿Qué es el sol?", "🙂🙃 what do these mean?"),
)
FOLLOW_UPS = (
    *("What is 5 + 8?", "Who are you?", "Spell the word tree.", "What is a river?"),
    "Tell me about the moon.",  # words:ignore
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


GREETING: list[Message] = [user("Hello!"), {"role": "assistant", "content": "Hello! How can I help you?"}]
SYSTEM: Message = {"role": "system", "content": "Answer in one sentence."}
CONVERSATIONS: list[list[Message]] = [
    *[[user(question)] for question in QUESTIONS],
    *[[*GREETING, user(question)] for question in FOLLOW_UPS],
    *[[SYSTEM, user(question)] for question in FOLLOW_UPS[3:5]],
]


@dataclass
class BenchmarkOptions:
    """Count the replies that are equal."""

    folder: Path = Path()
    """exported model"""
    port: int | None = None
    """port on this machine of an OpenAI-compatible server that serves it; default: transformers in this process"""
    max_tokens: int = 64
    """per reply"""


def main(options: BenchmarkOptions) -> None:
    ours = our_replies(options)
    ask = transformers_reply(options) if options.port is None else server_reply(options)
    theirs = [ask(conversation) for conversation in CONVERSATIONS]
    equal = 0
    for conversation, (expected, calls_tool), reply in zip(CONVERSATIONS, ours, theirs, strict=True):
        same = reply.startswith(expected) if calls_tool else reply == expected
        equal += same
        if not same:
            print(f"{conversation[-1]['content']}\n  ours:   {expected!r}\n  theirs: {reply!r}", file=sys.stderr)
    print(f"{equal} of {len(CONVERSATIONS)} replies equal, {sum(calls for _, calls in ours)} with a tool call")


def our_replies(options: BenchmarkOptions) -> list[tuple[str, bool]]:
    """Text of each reply of the engine in float32, and whether it calls the tool."""
    imported = read_model(str(options.folder))
    tokenizer = imported.tokenizer
    engine = Engine(imported.model, tokenizer)
    prompts = [tokenizer.render_prompt(conversation) for conversation in CONVERSATIONS]
    replies = []
    for completion in engine.generate(prompts, SamplingParams(max_tokens=options.max_tokens, temperature=0.0)):
        text, call_end, _ = tokenizer.decode(completion.tokens).partition("<|python_end|>")
        replies.append((without_special_tokens(text), bool(call_end)))
    return replies


def server_reply(options: BenchmarkOptions) -> Callable[[Sequence[Message]], str]:
    client = httpx2.Client(base_url=f"http://127.0.0.1:{options.port}", timeout=300)

    def ask(conversation: Sequence[Message]) -> str:
        body = {"model": "m", "messages": conversation, "temperature": 0, "max_tokens": options.max_tokens}
        try:
            response = client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            content = response.json()["choices"][0]["message"]["content"]
        except (httpx2.HTTPError, json.JSONDecodeError, LookupError) as error:
            raise UserError(f"the server on port {options.port} does not answer as OpenAI's API ({error!r})") from None
        return without_special_tokens(content or "")

    return ask


def transformers_reply(options: BenchmarkOptions) -> Callable[[Sequence[Message]], str]:
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, local_files_only=True)

    def ask(conversation: Sequence[Message]) -> str:
        inputs = tokenizer.apply_chat_template(
            list(conversation), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=options.max_tokens)[0]
        return str(tokenizer.decode(tokens[inputs["input_ids"].size(1) :], skip_special_tokens=True))

    return ask


def without_special_tokens(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
