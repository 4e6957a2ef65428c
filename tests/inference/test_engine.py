"""The engine generates the same tokens as the full forward pass."""

import dataclasses
import threading
from collections.abc import Collection

import pytest
import torch

from nanochat.errors import UserError
from nanochat.inference.engine import SUPPRESSED_TOKENS, Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Request
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model

PROMPT_LENGTHS = (1, 5, 17, 30)


class Echo:
    """A tool that says what it was given, once it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()

    def run(self, expression: str) -> str:
        self.may_answer.wait(10)
        return f"<{expression}>"


def model_for(tokenizer: Tokenizer) -> GPT:
    return random_model(tokenizer.vocab_size).eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 500, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def greedy_by_full_forward(
    tokenizer: Tokenizer, model: GPT, prompt: list[int], count: int, ends: Collection[int] = ()
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        logits = model(torch.tensor([tokens]))[0, -1, : tokenizer.vocab_size]
        logits[[tokenizer.special(name) for name in SUPPRESSED_TOKENS]] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def engine_for(
    tokenizer: Tokenizer, tool: Echo | None = None, *, max_batch_size: int = 16, late: bool = False
) -> Engine:
    """`late`: drawn tokens are read a step later, as on a GPU."""
    engine = Engine(model_for(tokenizer), tokenizer, tool, max_batch_size)
    engine.is_async = late
    return engine


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("prefill_tokens", [4, 7, 256])
@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_greedy_decoding_equals_the_full_forward(
    tokenizer: Tokenizer, max_batch_size: int, prefill_tokens: int, late: bool
) -> None:
    model = model_for(tokenizer)
    engine = engine_for(tokenizer, max_batch_size=max_batch_size, late=late)
    engine.scheduler.prefill_tokens = prefill_tokens
    ends = {tokenizer.bos_id, tokenizer.special("<|assistant_end|>")}
    completions = engine.generate(prompts(), SamplingParams(max_tokens=12, temperature=0))
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert completion.tokens == greedy_by_full_forward(tokenizer, model, prompt, 12, ends)


def test_grouped_query_attention_decodes_too(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size, n_head=4, n_kv_head=2, n_embd=128).eval()
    completions = Engine(model, tokenizer).generate(prompts(), SamplingParams(max_tokens=8, temperature=0))
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert completion.tokens == greedy_by_full_forward(tokenizer, model, prompt, len(completion.tokens))


def test_samples_do_not_depend_on_the_batch(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer, max_batch_size=4)
    samplings = [SamplingParams(max_tokens=10, seed=seed, top_k=20) for seed in range(4)]
    together = engine.generate(prompts(), samplings)
    alone = [engine.generate([prompt], [own])[0] for prompt, own in zip(prompts(), samplings, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_samples_of_one_prompt_differ(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer)
    completions = engine.generate([prompts()[1]] * 8, [SamplingParams(max_tokens=6, seed=seed) for seed in range(8)])
    assert len({tuple(c.tokens) for c in completions}) > 1
    assert len({c.tokens[0] for c in completions}) > 1  # the first token too is each sample's own


def test_replies_end_at_max_tokens_and_at_the_context(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer)
    (short,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0))
    assert short.finish_reason == "stop" or (len(short.tokens), short.finish_reason) == (2, "length")
    (long,) = engine.generate([[1] * 60], SamplingParams(max_tokens=1000, seed=5))
    assert long.finish_reason == "stop" or len(long.tokens) == 4  # the context is 64


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: Tokenizer, length: int) -> None:
    with pytest.raises(UserError, match="context"):
        Engine(model_for(tokenizer), tokenizer).submit([1] * length, SamplingParams())


def calling(request: Request, tokenizer: Tokenizer, engine: Engine, code: str) -> None:
    """Let a request write a tool call, as if the model had drawn it."""
    start, end = (tokenizer.special(name) for name in ("<|python_start|>", "<|python_end|>"))
    for token in (start, *tokenizer.encode(code), end):
        engine._append(request, token, sampled=True)


@pytest.mark.parametrize("late", [False, True])
def test_tool_output_is_appended_marked_and_continued_from(tokenizer: Tokenizer, late: bool) -> None:
    engine = engine_for(tokenizer, Echo(), late=late)
    request = engine.submit([tokenizer.bos_id, 5], SamplingParams(max_tokens=40, temperature=0))
    for _ in range(3):
        engine.step()
    calling(request, tokenizer, engine, "1+2")
    finish(engine)
    completion = request.completion
    forced = [token for token, drawn in zip(completion.tokens, completion.sampled, strict=True) if not drawn]
    assert tokenizer.decode(forced) == "<|output_start|><1+2><|output_end|>"
    after = len(completion.sampled) - completion.sampled[::-1].index(False)
    rest = completion.tokens[after:]
    context = request.tokens[: len(request.tokens) - len(rest)]
    assert rest and rest == greedy_by_full_forward(tokenizer, engine.model, context, len(rest))


@pytest.mark.parametrize("late", [False, True])
def test_a_slow_tool_does_not_delay_other_requests(tokenizer: Tokenizer, late: bool) -> None:
    tool = Echo()
    tool.may_answer.clear()
    engine = engine_for(tokenizer, tool, late=late)
    slow, other = (
        engine.submit([tokenizer.bos_id, first], SamplingParams(max_tokens=30, temperature=0)) for first in (5, 6)
    )
    engine.step()
    calling(slow, tokenizer, engine, "1+2")
    written = len(slow.completion.tokens)
    while other.completion.finish_reason is None:
        engine.step()
    assert len(slow.completion.tokens) == written
    tool.may_answer.set()
    finish(engine)
    assert slow.completion.finish_reason and len(slow.completion.tokens) > written


@pytest.mark.parametrize("late", [False, True])
def test_a_cancelled_request_leaves_the_batch_and_the_others_continue(tokenizer: Tokenizer, late: bool) -> None:
    engine = engine_for(tokenizer, late=late)
    requests = [engine.submit(prompt, SamplingParams(max_tokens=10, temperature=0)) for prompt in prompts()]
    for _ in range(3):
        engine.step()
    engine.cancel(requests[0])
    assert len(engine.scheduler.running) == len(requests) - 1
    newcomer = engine.submit(prompts()[2], SamplingParams(max_tokens=10, temperature=0))
    finish(engine)
    assert requests[0].completion.finish_reason is None and len(requests[0].completion.tokens) <= 3
    for request, prompt in [*list(zip(requests, prompts(), strict=True))[1:], (newcomer, prompts()[2])]:
        tokens = request.completion.tokens
        assert tokens == greedy_by_full_forward(tokenizer, engine.model, prompt, len(tokens))


def test_a_waiting_request_can_be_cancelled(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer, max_batch_size=1)
    first, second = (engine.submit([5, 6], SamplingParams(max_tokens=3)) for _ in range(2))
    engine.step()
    engine.cancel(second)
    finish(engine)
    assert first.completion.tokens and not second.completion.tokens


def test_slots_keep_to_the_memory_budget(tokenizer: Tokenizer) -> None:
    model = model_for(tokenizer)
    slot = 2 * 2 * 128 * 64 * 4  # keys and values of two layers, width 128, 64 positions, four bytes
    engine = Engine(model, tokenizer, max_batch_size=16, kv_cache_gb=3.5 * slot / 1e9)
    engine.generate(prompts(), SamplingParams(max_tokens=2))
    assert engine.slots == 3 and engine.stats().kv_bytes == 3 * slot
    with pytest.raises(UserError, match="kv-cache-gb"):
        Engine(model, tokenizer, kv_cache_gb=0.5 * slot / 1e9)


def test_a_long_prompt_does_not_stall_decoding(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer)
    engine.scheduler.prefill_tokens = 8
    writer = engine.submit([5, 6, 7], SamplingParams(max_tokens=40, seed=1))
    engine.step()
    reader = engine.submit(prompts()[-1], SamplingParams(max_tokens=4))  # 30 tokens: four steps
    for step in range(1, 4):
        engine.step()
        assert len(writer.completion.tokens) == 1 + step and not reader.completion.tokens
    engine.step()
    assert len(writer.completion.tokens) == 5 and len(reader.completion.tokens) == 1


def test_the_next_turn_computes_only_what_is_new(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    first, second = prompts()[2], prompts()[1]
    (reply,) = engine.generate([first], greedy)
    computed = engine.stats().prefilled_tokens
    conversation = [*first, *reply.tokens, *second]
    (continued,) = engine.generate([conversation], greedy)
    assert continued.tokens == greedy_by_full_forward(tokenizer, engine.model, conversation, len(continued.tokens))
    # the last token of the reply was drawn and never read
    assert engine.stats().prefilled_tokens - computed == len(second) + 1 and engine.stats().prefix_hits == 1


def test_samples_of_one_prompt_read_it_once(tokenizer: Tokenizer) -> None:
    prompt, other = prompts()[3], prompts()[2]
    samplings = [SamplingParams(max_tokens=6, seed=seed) for seed in range(12)]
    engine = engine_for(tokenizer, max_batch_size=8)
    together = engine.generate([prompt] * 6 + [other] * 6, samplings)
    copies = 10  # their last token is computed nevertheless: its logits are needed
    assert engine.stats().prefilled_tokens == len(prompt) + len(other) + copies
    apart = [engine_for(tokenizer).generate([prompt if i < 6 else other], own)[0] for i, own in enumerate(samplings)]
    assert [c.tokens for c in together] == [c.tokens for c in apart]


def test_a_long_conversation_is_copied_not_overwritten(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer, max_batch_size=2)
    system, long = prompts()[2], prompts()[3]
    engine.generate([[*system, *long]], SamplingParams(max_tokens=2))
    engine.generate([[*system, 9]], SamplingParams(max_tokens=2))
    computed = engine.stats().prefilled_tokens
    engine.generate([[*system, *long, 8]], SamplingParams(max_tokens=2))
    assert engine.stats().prefilled_tokens - computed <= 3


def test_reset_applies_changed_weights(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer)
    prompt, greedy = prompts()[3], SamplingParams(max_tokens=8, temperature=0)
    engine.generate([prompt], greedy)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.copy_(parameter.flip(0))
    engine.reset()
    (completion,) = engine.generate([prompt], greedy)
    assert completion.tokens == greedy_by_full_forward(tokenizer, engine.model, prompt, len(completion.tokens))


def test_a_stop_string_ends_the_reply(tokenizer: Tokenizer) -> None:
    engine = engine_for(tokenizer)
    plain = SamplingParams(max_tokens=30, temperature=0)
    text = tokenizer.decode(engine.generate([prompts()[2]], plain)[0].tokens)
    stop = text[len(text) // 2 :][:3]
    (completion,) = engine.generate(
        [prompts()[2]], SamplingParams(max_tokens=30, temperature=0, stop=("never said", stop))
    )
    written = tokenizer.decode(completion.tokens)
    assert completion.finish_reason == "stop" and stop in written and len(written) < len(text)


@pytest.mark.parametrize("late", [False, True])
def test_logprobs_are_the_full_forward_s(tokenizer: Tokenizer, late: bool) -> None:
    engine = engine_for(tokenizer, late=late)
    request = engine.submit(prompts()[1], SamplingParams(max_tokens=5, temperature=0.5, seed=4, logprobs=3))
    engine.submit(prompts()[2], SamplingParams(max_tokens=7))
    finish(engine)
    completion = request.completion
    assert len(completion.logprobs) == len(completion.tokens)
    with torch.no_grad():
        logits = engine.model(torch.tensor([request.tokens]))[0, len(prompts()[1]) - 1 : -1]
    logits[:, [tokenizer.special(name) for name in SUPPRESSED_TOKENS]] = -torch.inf
    expected = logits[:, : tokenizer.vocab_size].log_softmax(1)
    for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        assert logprob is not None and logprob.token == token in dict(logprob.top)
        assert logprob.logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
        assert [t for t, _ in logprob.top[:3]] == expected[i].topk(3).indices.tolist()


@pytest.mark.parametrize("late", [False, True])
def test_a_heavy_repetition_penalty_never_repeats(tokenizer: Tokenizer, late: bool) -> None:
    engine = engine_for(tokenizer, late=late)
    with torch.no_grad():  # positive logits: dividing them makes them smaller
        engine.model.lm_head.weight.abs_()
    sampling = SamplingParams(max_tokens=20, temperature=0, repetition_penalty=50.0)
    request, _ = engine.submit([3, 4], sampling), engine.submit([5, 6], SamplingParams(max_tokens=20))
    finish(engine)
    assert len(set(request.tokens)) == len(request.tokens)
    (free,) = engine_for(tokenizer).generate([[3, 4]], SamplingParams(max_tokens=20, temperature=0))
    assert free.tokens != request.completion.tokens


def test_padding_and_suppressed_tokens_are_never_sampled() -> None:
    tokenizer = Tokenizer.train(["some text to learn a few merges from"] * 3, 270)
    model = random_model(tokenizer.vocab_size).eval()
    assert model.config.vocab_size > tokenizer.vocab_size
    forbidden = [tokenizer.special(name) for name in SUPPRESSED_TOKENS] + list(range(270, model.config.vocab_size))
    with torch.no_grad():  # every logit that must not win does
        model.lm_head.weight[forbidden] *= 50
    kinds = [
        SamplingParams(40, 1.0, None),
        SamplingParams(40, 1.0, 300),
        SamplingParams(40, 0.0),
        SamplingParams(40, repetition_penalty=1.1),
    ]
    samplings = [dataclasses.replace(kinds[seed % 4], seed=seed) for seed in range(16)]
    completions = Engine(model, tokenizer).generate([[5]] * 16, samplings)
    assert not {token for completion in completions for token in completion.tokens} & set(forbidden)
