"""Cached, batched decoding writes what the full forward pass would."""

from collections.abc import Collection

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.inference.engine import NEVER_DRAWN, Engine
from nanochat.inference.sampling import Sampling, sample, uniform
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model

PROMPT_LENGTHS = (1, 5, 17, 30)


class Echo:
    """A tool that says what it was given."""

    def run(self, expression: str) -> str:
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
        logits[[tokenizer.special(name) for name in NEVER_DRAWN]] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_greedy_decoding_equals_the_full_forward(tokenizer: Tokenizer, max_batch_size: int) -> None:
    model = model_for(tokenizer)
    engine = Engine(model, tokenizer, max_batch_size=max_batch_size)
    ends = {tokenizer.bos_id, tokenizer.special("<|assistant_end|>")}
    completions = engine.generate(prompts(), Sampling(max_tokens=12, temperature=0))
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert completion.tokens == greedy_by_full_forward(tokenizer, model, prompt, 12, ends)


def test_grouped_query_attention_decodes_too(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size, n_head=4, n_kv_head=2, n_embd=128).eval()
    completions = Engine(model, tokenizer).generate(prompts(), Sampling(max_tokens=8, temperature=0))
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert completion.tokens == greedy_by_full_forward(tokenizer, model, prompt, len(completion.tokens))


def test_samples_do_not_depend_on_the_company(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer, max_batch_size=4)
    samplings = [Sampling(max_tokens=10, seed=seed, top_k=20) for seed in range(4)]
    together = engine.generate(prompts(), samplings)
    alone = [engine.generate([prompt], [own])[0] for prompt, own in zip(prompts(), samplings, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_samples_of_one_prompt_differ(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer)
    completions = engine.generate([prompts()[1]] * 8, [Sampling(max_tokens=6, seed=seed) for seed in range(8)])
    assert len({tuple(c.tokens) for c in completions}) > 1
    assert len({c.tokens[0] for c in completions}) > 1  # the first token too is each sample's own


def test_replies_end_at_max_tokens_and_at_the_context(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer)
    (short,) = engine.generate([[1, 2, 3]], Sampling(max_tokens=2, temperature=0))
    assert short.finish_reason == "stop" or (len(short.tokens), short.finish_reason) == (2, "length")
    (long,) = engine.generate([[1] * 60], Sampling(max_tokens=1000, seed=5))
    assert long.finish_reason == "stop" or len(long.tokens) == 4  # the context is 64


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: Tokenizer, length: int) -> None:
    with pytest.raises(UserError, match="context"):
        Engine(model_for(tokenizer), tokenizer).submit([1] * length, Sampling())


def test_the_tool_s_output_is_forced_and_marked(tokenizer: Tokenizer) -> None:
    engine = Engine(model_for(tokenizer), tokenizer, Echo())
    request = engine.submit([tokenizer.bos_id, 5], Sampling(max_tokens=40, temperature=0))
    engine.step()
    python_start, python_end = (tokenizer.special(name) for name in ("<|python_start|>", "<|python_end|>"))
    for token in (python_start, *tokenizer.encode("1+2"), python_end):  # as if the model had drawn them
        engine._accept(request, token)
    while request.forced:
        engine.step()
    completion = request.completion
    forced = [token for token, drawn in zip(completion.tokens, completion.sampled, strict=True) if not drawn]
    assert tokenizer.decode(forced) == "<|output_start|><1+2><|output_end|>"


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    model = model_for(tokenizer)
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_tokens=10, temperature=0)
    requests = [engine.submit(prompt, sampling) for prompt in prompts()]
    for _ in range(3):
        engine.step()
    engine.cancel(requests[0])
    while engine.active:
        engine.step()
    assert requests[0].completion.finish_reason is None
    for request, prompt in list(zip(requests, prompts(), strict=True))[1:]:
        tokens = request.completion.tokens
        assert tokens == greedy_by_full_forward(tokenizer, model, prompt, len(tokens))


def test_padding_and_the_tokens_of_others_are_never_drawn() -> None:
    tokenizer = Tokenizer.train(["some text to learn a few merges from"] * 3, 270)
    model = random_model(tokenizer.vocab_size).eval()
    assert model.config.vocab_size > tokenizer.vocab_size
    forbidden = [tokenizer.special(name) for name in NEVER_DRAWN] + list(range(270, model.config.vocab_size))
    with torch.no_grad():  # every logit that must not win does
        model.lm_head.weight[forbidden] *= 50
    completions = Engine(model, tokenizer).generate([[5]] * 8, [Sampling(40, 1.0, None, seed) for seed in range(8)])
    assert not {token for completion in completions for token in completion.tokens} & set(forbidden)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).repeat(20_000, 1)
    samplings = [Sampling(seed=seed, top_k=None) for seed in range(20_000)]
    counts = torch.bincount(torch.tensor(sample(logits, samplings, [0] * 20_000)), minlength=4) / 20_000
    torch.testing.assert_close(counts, logits[0].softmax(0), atol=0.015, rtol=0)


def test_top_k_and_temperature_are_each_request_s_own() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.8, 2.7]]).repeat(300, 1)
    kinds = [Sampling(temperature=0), Sampling(top_k=2), Sampling(top_k=0)]
    samplings = [Sampling(k.max_tokens, k.temperature, k.top_k, seed) for seed in range(100) for k in kinds]
    drawn = sample(logits, samplings, [0] * 300)
    assert set(drawn[0::3]) == {0} and set(drawn[1::3]) == {0, 1} and set(drawn[2::3]) == {0, 1, 2, 3}


def test_uniform_draws_are_uniform_and_repeat() -> None:
    draws = uniform(range(10_000), [3] * 10_000)
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert (draws == uniform(range(10_000), [3] * 10_000)).all()
    for seeds, index in ((range(10_000), 4), (range(1, 10_001), 2), (range(1, 10_001), 3)):
        assert abs(np.corrcoef(draws, uniform(seeds, [index] * 10_000))[0, 1]) < 0.04


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -5}])
def test_impossible_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="cannot be"):
        Sampling(**wrong)
