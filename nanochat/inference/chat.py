"""Chat with a trained model: load a checkpoint and stream replies."""

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from nanochat import paths
from nanochat.conversations import Message, text_of
from nanochat.inference.detokenizer import Delta, reply_parts
from nanochat.inference.engine import Engine, Tool
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Completion
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.sandbox.calculator import Calculator
from nanochat.tokenizer import Tokenizer
from nanochat.train.checkpoint import Checkpoint

QUESTIONS = ("Who are you?", "What is 37 * 45?", "Why is the sky blue?")
"""Asked during training."""


@dataclass
class ChatModel:
    """A trained model with its tokenizer and engine."""

    source: str  # base, mid, sft or rl
    engine: Engine
    description: str = ""  # readable name: `sft d4 step 300`

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """Maximum number of tokens of conversation and reply together."""
        return self.engine.model.config.sequence_len

    def prompt(self, messages: Sequence[Message], max_reply: int | None = None) -> list[int]:
        """Render a conversation as the tokens of a prompt.

        With `max_reply`, a prompt loses its start if it would leave less room for the reply, or than half the context.
        """
        tokens = prompt_tokens(self.tokenizer, self.source, messages)
        return tokens if max_reply is None else tokens[-(self.context - min(max_reply, self.context // 2)) :]

    def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, stop: threading.Event | None = None
    ) -> Generator[Delta, None, Completion]:
        """Yield the reply to a conversation in pieces and return the completion.

        Ends early, without a finish_reason, when `stop` is set. Raises UserError if the prompt does not fit.
        """
        request = self.engine.submit(self.prompt(messages), sampling)
        try:
            while not request.completion.finish_reason and not (stop and stop.is_set()):
                self.engine.step()
                yield from request.new_deltas(end=False)
            yield from request.new_deltas(end=True)
            return request.completion
        finally:
            self.engine.cancel(request)


def prompt_tokens(tokenizer: Tokenizer, source: str, messages: Sequence[Message]) -> list[int]:
    """Render a conversation as a prompt; for a base model, which has no chat format, the last message as plain text."""
    if source == "base":
        return [tokenizer.bos_id, *tokenizer.encode(text_of(messages[-1]))]
    return tokenizer.render_prompt(messages)


def load_chat(
    found: Checkpoint, device_type: str = "auto", max_batch_size: int = 16, kv_cache_gb: float | None = None
) -> ChatModel:
    """Load a checkpoint. max_batch_size, kv_cache_gb: passed to Engine. Raises UserError if its tokenizer differs."""
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    runtime = Runtime.start(device_type)
    model = found.load_model(runtime.device, runtime.compute_dtype, tokenizer).eval()
    model.to(runtime.compute_dtype)  # inference needs no fp32 weights: half the memory, and no cast per token
    engine = Engine(model, tokenizer, Calculator(), max_batch_size, kv_cache_gb)
    return ChatModel(found.source, engine, found.describe())


def answers(model: GPT, tokenizer: Tokenizer, tool: Tool) -> list[str]:
    """Greedy replies to `QUESTIONS`, one line each, with tool calls and their results in brackets."""
    shown = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    prompts = [tokenizer.render_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    completions = Engine(model, tokenizer, tool).generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    replies = (reply_parts(tokenizer, completion.tokens) for completion in completions)
    lines = ("".join(shown[part["type"]].format(part["text"]) for part in parts) for parts in replies)
    return [f"{question} — {' '.join(line.split())}" for question, line in zip(QUESTIONS, lines, strict=True)]
