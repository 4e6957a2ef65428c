"""Sample texts during training: greedy replies to a few fixed prompts."""

from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.engine import Engine, Tool
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The planets of the solar system are:")
QUESTIONS = ("Who are you?", "What is 37 * 45?", "Why is the sky blue?")


def continuations(model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Continuations of `PROMPTS` by a base model, one line each."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    replies = _generate(model, tokenizer, None, prompts)
    return [" ".join((text + reply).split()) for text, reply in zip(PROMPTS, replies, strict=True)]


def answers(model: GPT, tokenizer: Tokenizer, tool: Tool) -> list[str]:
    """Replies of a chat model to `QUESTIONS`, one line each, with tool calls and their results in brackets."""
    prompts = [tokenizer.render_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    replies = _generate(model, tokenizer, tool, prompts)
    return [f"{question} — {' '.join(reply.split())}" for question, reply in zip(QUESTIONS, replies, strict=True)]


def _generate(model: GPT, tokenizer: Tokenizer, tool: Tool | None, prompts: list[list[int]]) -> list[str]:
    shown = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    completions = Engine(model, tokenizer, tool).generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    replies = (reply_parts(tokenizer, completion.tokens) for completion in completions)
    return ["".join(shown[part["type"]].format(part["text"]) for part in parts) for parts in replies]
