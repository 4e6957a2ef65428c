"""How fast the engine writes, beside transformers' generate on the same weights.

python -m benchmarks.inference --depth 4 --vocab-size 8192
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import NanoChatConfig, NanoChatForCausalLM

from nanochat import cli
from nanochat.data import demo_data
from nanochat.hub.convert_model import hf_name, hf_shape
from nanochat.inference.engine import Engine
from nanochat.inference.request import Request
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, measure_matmul_flops
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import check_range


@dataclass
class BenchmarkOptions:
    """Time prefill and decoding of a model with random weights. Medians over repeats, taken in turn."""

    depth: int = 4
    vocab_size: int = 8192
    max_seq_len: int = 1024
    prompt_tokens: int = 64
    """in the mean; the engine's differ in length"""
    new_tokens: int = 128
    """written after each prompt; nothing ends a reply early"""
    streams: int = 16
    """requests at once in the batched figures"""
    prefill_prompt_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 50
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's processor time, which with OMP_NUM_THREADS=1 can be compared on a busy machine too"""
    repeats: int = 5
    device_type: str = "auto"
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "streams", "repeats"):
            check_range(name, getattr(self, name), 1)


class Bench:
    """The model, the engine and the peer, and what is asked of them."""

    def __init__(self, options: BenchmarkOptions) -> None:
        self.options = options
        self.runtime = Runtime.start(options.device_type)
        self.clock = time.perf_counter if options.clock == "wall" else time.process_time
        torch.manual_seed(0)
        self.tokenizer = Tokenizer.train(demo_data.documents("train")[:2000], options.vocab_size)
        config = GPTConfig.from_depth(options.depth, options.vocab_size, options.max_seq_len)
        self.model = GPT(config, self.runtime.compute_dtype).to(self.runtime.device).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.5 * parameter.size(1) ** -0.5)
        with torch.no_grad():  # a reply that ends early would spoil the count
            for name in ("<|bos|>", "<|assistant_end|>", "<|python_end|>"):
                self.model.lm_head.weight[self.tokenizer.special(name)] = 0
        self.model.to(self.runtime.compute_dtype)
        self.engine = Engine(self.model, self.tokenizer, max_batch_size=options.streams)
        self.peer = peer_of(self.model)
        self.generator = torch.Generator().manual_seed(1)
        self._seed = 0

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """New random prompts: none has anything in common with another, so no prefix is reused."""
        return torch.randint(0, 256, (count, length), generator=self.generator).tolist()

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The sampling timed, with a new seed."""
        self._seed += 1
        return SamplingParams(max_tokens, self.options.temperature, self.options.top_k, self._seed)

    def decode(self, streams: int) -> float:
        """Tokens a second while `streams` requests write, from the first token of the last to the first end."""
        engine = self.engine
        length, count = self.options.prompt_tokens, self.options.new_tokens
        # prompts of different lengths, half to one and a half times what was asked for
        prompts = [self.prompts(1, length // 2 + length * (i + 1) // (streams + 1))[0] for i in range(streams)]
        requests = [engine.submit(prompt, self.sampling(count)) for prompt in prompts]
        while not all(request.completion.tokens for request in requests):
            engine.step()
        self.runtime.synchronize()
        begun, before = self.clock(), written(requests)
        while all(request.completion.finish_reason is None for request in requests):
            engine.step()
        self.runtime.synchronize()
        speed = (written(requests) - before) / (self.clock() - begun)
        while engine.busy:
            engine.step()
        return speed

    @torch.inference_mode()
    def peer_decode(self, streams: int) -> float:
        """Tokens a second of transformers' generate: what 64 and more new tokens take beyond what one takes."""
        prompts = torch.tensor(self.prompts(streams, self.options.prompt_tokens), device=self.runtime.device)
        one, all_ = (self._peer_seconds(prompts, count) for count in (1, self.options.new_tokens))
        return streams * (self.options.new_tokens - 1) / (all_ - one)

    def _peer_seconds(self, prompts: Tensor, count: int) -> float:
        self.runtime.synchronize()
        begun = self.clock()
        found = self.peer.generate(
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
        assert isinstance(found, Tensor) and found.size(1) == prompts.size(1) + count
        return self.clock() - begun

    def prefill(self) -> float:
        """Prompt tokens a second, of one long prompt after another."""
        length = self.options.prefill_prompt_tokens
        prompts = self.prompts(4, length)
        begun = self.clock()
        for prompt in prompts:
            self.engine.generate([prompt], self.sampling(1))
        self.runtime.synchronize()
        return len(prompts) * length / (self.clock() - begun)

    @torch.inference_mode()
    def peer_prefill(self) -> float:
        """As `prefill`, by transformers."""
        length = self.options.prefill_prompt_tokens
        prompts = torch.tensor(self.prompts(4, length), device=self.runtime.device)
        begun = self.clock()
        for prompt in prompts:
            self.peer(prompt[None], use_cache=True, logits_to_keep=1)
        self.runtime.synchronize()
        return len(prompts) * length / (self.clock() - begun)

    def matmul_flops(self) -> float:
        """FLOP/s of a large matmul, by the same clock."""
        return measure_matmul_flops(self.runtime.device, self.runtime.compute_dtype, self.clock)

    def first_token_under_load(self) -> float:
        """Seconds to the first token of one more request, while all other slots are writing."""
        engine = self.engine
        others = [
            engine.submit(prompt, self.sampling(self.options.new_tokens))
            for prompt in self.prompts(self.options.streams - 1, self.options.prompt_tokens)
        ]
        while not all(request.completion.tokens for request in others):
            engine.step()
        begun = self.clock()
        request = engine.submit(self.prompts(1, self.options.prompt_tokens)[0], self.sampling(2))
        while not request.completion.tokens:
            engine.step()
        seconds = self.clock() - begun
        for other in [*others, request]:
            engine.cancel(other)
        return seconds

    def scheduler_share(self) -> float:
        """The part of a step's time that the scheduler takes, with all slots writing."""
        scheduler = self.engine.scheduler
        schedule, spent = scheduler.schedule, 0.0

        def timed() -> Any:
            nonlocal spent
            begun = self.clock()
            chunks = schedule()
            spent += self.clock() - begun
            return chunks

        scheduler.schedule = timed  # type: ignore[method-assign]  # a clock around it
        begun = self.clock()
        self.engine.generate(
            self.prompts(2 * self.options.streams, self.options.prompt_tokens), self.sampling(self.options.new_tokens)
        )
        seconds = self.clock() - begun
        scheduler.schedule = schedule  # type: ignore[method-assign]
        return spent / seconds


def peer_of(model: GPT) -> Any:
    """transformers' model with the same weights."""
    peer = NanoChatForCausalLM(NanoChatConfig(**hf_shape(model.config)))
    peer.load_state_dict({hf_name(name): weight for name, weight in model.state_dict().items()})
    return peer.eval().to(model.device, model.compute_dtype)


def written(requests: list[Request]) -> int:
    """Tokens that requests have written in all."""
    return sum(len(request.completion.tokens) for request in requests)


def prefill_flops(config: GPTConfig, length: int) -> float:
    """Floating-point operations for each token of a prompt: the blocks' matrices, and attention to what came before."""
    matrices = config.num_parameters - 2 * config.vocab_size * config.n_embd
    return 2 * matrices + 2 * config.n_layer * config.n_embd * length


def main(options: BenchmarkOptions) -> None:
    bench = Bench(options)
    one, many = "1 stream, tok/s", f"{options.streams} streams, tok/s"
    first = f"first token beside {options.streams - 1} streams, ms"
    figures: dict[str, Callable[[], float]] = {
        one: lambda: bench.decode(1),
        f"transformers, {one}": lambda: bench.peer_decode(1),
        many: lambda: bench.decode(options.streams),
        f"transformers, {many}": lambda: bench.peer_decode(options.streams),
        "prefill, tok/s": bench.prefill,
        "transformers, prefill, tok/s": bench.peer_prefill,
        first: lambda: 1000 * bench.first_token_under_load(),
        "scheduler's share of the time, %": lambda: 100 * bench.scheduler_share(),
        "matmul peak, TFLOP/s": lambda: bench.matmul_flops() / 1e12,
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
    peak = medians["matmul peak, TFLOP/s"] * 1e12
    flops = prefill_flops(bench.model.config, options.prefill_prompt_tokens)
    medians["prefill, share of the matmul peak, %"] = 100 * medians["prefill, tok/s"] * flops / peak
    about = {
        "model": f"d{options.depth}, vocabulary {bench.model.config.vocab_size}, {bench.runtime.describe()}, "
        f"{options.clock} time",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
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
