"""Tokens/s of the inference engine and of transformers' generate with the same weights.

python -m benchmarks.inference --depth 4 --vocab-size 8192
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from benchmarks.random_model import random_model
from nanochat import cli
from nanochat.data import demo_data
from nanochat.hub.convert_model import hf_model, hf_weights
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Request
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, measure_matmul_flops, software
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range

NUM_PREFILLS = 4


@dataclass
class BenchmarkOptions:
    """Time prefill and decoding with random weights. Figures are medians over repeats, measured in turn."""

    depth: int = 4
    vocab_size: int = 8192
    max_seq_len: int = 1024
    prompt_tokens: int = 64
    """mean length of a prompt"""
    new_tokens: int = 128
    """per reply"""
    streams: int = 16
    """concurrent requests in the batched figures"""
    prefill_prompt_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 50
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: CPU time of this process, which with OMP_NUM_THREADS=1 is comparable on a busy machine too"""
    repeats: int = 5
    device_type: str = "auto"
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "streams", "repeats"):
            check_range(name, getattr(self, name), 1)


class Bench:
    """The engine and transformers' model with the same weights; each method measures one figure."""

    def __init__(self, options: BenchmarkOptions) -> None:
        self.options = options
        self.runtime = Runtime.start(options.device_type)
        self.clock = time.perf_counter if options.clock == "wall" else time.process_time
        tokenizer = Tokenizer.train(demo_data.documents("train")[:2000], options.vocab_size)
        self.model = random_model(options.depth, options.vocab_size, options.max_seq_len, self.runtime, gain=0.5)
        with torch.no_grad():  # so that no reply ends early
            for name in ("<|bos|>", "<|assistant_end|>", "<|python_end|>"):
                self.model.lm_head.weight[tokenizer.special(name)] = 0
        self.model.to(self.runtime.compute_dtype)
        self.engine = Engine(self.model, tokenizer, max_batch_size=options.streams)
        self.transformers_model = convert_to_transformers(self.model)
        self.generator = torch.Generator().manual_seed(1)
        self._seed = 0

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """New random prompts, which share no prefix that the engine could reuse."""
        return torch.randint(0, 256, (count, length), generator=self.generator).tolist()

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Sampling parameters with a new seed."""
        self._seed += 1
        return SamplingParams(max_tokens, self.options.temperature, self.options.top_k, self._seed)

    def start_replies(self, prompts: list[list[int]]) -> list[Request]:
        """Submit requests, and step until each has its first token."""
        requests = [self.engine.submit(prompt, self.sampling(self.options.new_tokens)) for prompt in prompts]
        while not all(request.completion.tokens for request in requests):
            self.engine.step()
        self.runtime.synchronize()
        return requests

    def decode(self, streams: int) -> float:
        """Tokens/s while all of `streams` requests decode."""
        length = self.options.prompt_tokens
        # prompts of half to one and a half times the mean length
        lengths = (length // 2 + length * (i + 1) // (streams + 1) for i in range(streams))
        requests = self.start_replies([self.prompts(1, length)[0] for length in lengths])
        start, before = self.clock(), num_tokens(requests)
        while all(request.completion.finish_reason is None for request in requests):
            self.engine.step()
        self.runtime.synchronize()
        speed = (num_tokens(requests) - before) / (self.clock() - start)
        while self.engine.busy:
            self.engine.step()
        return speed

    @torch.inference_mode()
    def transformers_decode(self, streams: int) -> float:
        """Tokens/s of transformers' generate, with the time until the first token subtracted."""
        prompts = torch.tensor(self.prompts(streams, self.options.prompt_tokens), device=self.runtime.device)
        first, total = (self._generate_seconds(prompts, count) for count in (1, self.options.new_tokens))
        return streams * (self.options.new_tokens - 1) / (total - first)

    def _generate_seconds(self, prompts: Tensor, count: int) -> float:
        self.runtime.synchronize()
        start = self.clock()
        output = self.transformers_model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=self.options.temperature > 0,
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        self.runtime.synchronize()
        assert output.size(1) == prompts.size(1) + count
        return self.clock() - start

    def prefill(self) -> float:
        """Prompt tokens/s of the engine, one long prompt at a time."""
        return self._prefill_speed(lambda prompt: self.engine.generate([prompt], self.sampling(1)))

    @torch.inference_mode()
    def transformers_prefill(self) -> float:
        """Prompt tokens/s of transformers' model."""
        device = self.runtime.device
        return self._prefill_speed(
            lambda prompt: self.transformers_model(
                torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1
            )
        )

    def _prefill_speed(self, run: Callable[[list[int]], object]) -> float:
        prompts = self.prompts(NUM_PREFILLS, self.options.prefill_prompt_tokens)
        start = self.clock()
        for prompt in prompts:
            run(prompt)
        self.runtime.synchronize()
        return NUM_PREFILLS * self.options.prefill_prompt_tokens / (self.clock() - start)

    def first_token_under_load(self) -> float:
        """Milliseconds to the first token of one more request while all other slots decode."""
        others = self.start_replies(self.prompts(self.options.streams - 1, self.options.prompt_tokens))
        start = self.clock()
        requests = self.start_replies(self.prompts(1, self.options.prompt_tokens))
        seconds = self.clock() - start
        for request in [*others, *requests]:
            self.engine.cancel(request)
        return 1000 * seconds

    def matmul_tflops(self) -> float:
        """TFLOP/s of a large matmul in the engine's dtype, by the same clock."""
        return measure_matmul_flops(self.runtime.device, self.model.compute_dtype, self.clock) / 1e12


def convert_to_transformers(model: GPT) -> Any:
    converted: Any = hf_model(model.config)
    converted.load_state_dict(hf_weights(model.state_dict(), model.config))
    return converted.eval().to(model.device, model.compute_dtype)


def num_tokens(requests: list[Request]) -> int:
    return sum(len(request.completion.tokens) for request in requests)


def prefill_flops(config: GPTConfig, length: int) -> float:
    """FLOPs per prompt token: the matrices of the blocks, and attention to the preceding tokens."""
    matrices = config.num_parameters - 2 * config.vocab_size * config.n_embd
    return 2 * matrices + 2 * config.n_layer * config.n_embd * length


def main(options: BenchmarkOptions) -> None:
    bench = Bench(options)
    one, many = "1 stream, tokens/s", f"{options.streams} streams, tokens/s"
    figures: dict[str, Callable[[], float]] = {
        one: lambda: bench.decode(1),
        f"transformers, {one}": lambda: bench.transformers_decode(1),
        many: lambda: bench.decode(options.streams),
        f"transformers, {many}": lambda: bench.transformers_decode(options.streams),
        "prefill, tokens/s": bench.prefill,
        "transformers, prefill, tokens/s": bench.transformers_prefill,
        f"first token with {options.streams - 1} other streams, ms": bench.first_token_under_load,
        "matmul peak, TFLOP/s": bench.matmul_tflops,
    }
    for figure in figures.values():
        figure()  # warm up
    measured: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(options.repeats):
        for name, figure in figures.items():
            measured[name].append(figure())
    medians = {name: statistics.median(values) for name, values in measured.items()}
    medians["1 stream, times transformers"] = medians[one] / medians[f"transformers, {one}"]
    medians[f"{options.streams} streams, times one"] = medians[many] / medians[one]
    flops = medians["prefill, tokens/s"] * prefill_flops(bench.model.config, options.prefill_prompt_tokens)
    medians["prefill, share of the matmul peak, %"] = 100 * flops / (medians["matmul peak, TFLOP/s"] * 1e12)
    about = {
        "model": f"d{options.depth}, vocabulary {options.vocab_size}, {bench.runtime.describe()}, {options.clock} time",
        "versions": f"{software()}, transformers {transformers.__version__}",
    }
    if options.json:
        print(json.dumps({**about, "medians": medians, "runs": measured}))
        return
    print(*about.values(), sep="\n")
    for name, median in medians.items():
        runs = measured.get(name)
        print(f"{name:<38} {median:10.2f}" + (f"   {min(runs):.2f} to {max(runs):.2f}" if runs else ""))


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
