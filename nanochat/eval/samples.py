"""What a model writes in the middle of its training, so that one sees it learn: always the same prompts, greedily."""

from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.engine import Engine, Tool
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

BEGINNINGS = ("The capital of France is", "The chemical symbol of gold is", "The planets of the solar system are:")
QUESTIONS = ("Who are you?", "What is 37 * 45?", "Why is the sky blue?")


def continuations(model: GPT, tokenizer: Tokenizer) -> list[str]:
    """How a base model goes on after a few beginnings; a line each."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in BEGINNINGS]
    replies = _written(model, tokenizer, None, prompts)
    return [" ".join((text + reply).split()) for text, reply in zip(BEGINNINGS, replies, strict=True)]


def answers(model: GPT, tokenizer: Tokenizer, tool: Tool) -> list[str]:
    """What a chat model says to a few questions; a line each, a tool call and its result in brackets."""
    prompts = [tokenizer.render_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    replies = _written(model, tokenizer, tool, prompts)
    return [f"{question} — {' '.join(reply.split())}" for question, reply in zip(QUESTIONS, replies, strict=True)]


def _written(model: GPT, tokenizer: Tokenizer, tool: Tool | None, prompts: list[list[int]]) -> list[str]:
    shown = {"text": "{}", "python": "[{}", "python_output": " → {}]"}
    completions = Engine(model, tokenizer, tool).generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    replies = (reply_parts(tokenizer, completion.tokens) for completion in completions)
    return ["".join(shown[part["type"]].format(part["text"]) for part in parts) for parts in replies]
