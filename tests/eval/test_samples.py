"""Samples during pretraining are what the engine generates greedily."""

import torch

from nanochat.eval import samples
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model


def test_continuations_are_those_of_the_engine(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size, sequence_len=64).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.bos_id + 1 :] = 0  # a base model does not write the tokens of a chat
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in samples.PROMPTS]
    longest = max(map(len, prompts))
    greedy = SamplingParams(max_tokens=min(samples.NUM_TOKENS, 64 - longest), temperature=0)
    completions = Engine(model, tokenizer).generate(prompts, greedy)
    expected = [
        tokenizer.decode([token for token in prompt + completion.tokens if token != tokenizer.bos_id])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    assert samples.continuations(model, tokenizer) == [" ".join(text.split()) for text in expected]
