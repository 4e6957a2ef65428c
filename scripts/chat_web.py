"""Talk to a model in the browser: `./chat.sh`, or python -m scripts.chat_web --port 8000."""

import functools
import os
from dataclasses import dataclass, field

import torch

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.inference.sampling_params import CHAT_SAMPLING, SamplingParams
from nanochat.runtime import resolve_device_type
from nanochat.serve import http_server
from nanochat.serve.app import create_app
from nanochat.serve.model_registry import ModelCard, ModelRegistry, trained_models
from nanochat.serve.pool import Pool
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.options import check_range


@dataclass
class Options:
    """Serve the chat page and OpenAI's API."""

    source: str | None = None
    """base, mid, sft or rl; by default the most advanced there is"""
    model_tag: str | None = None
    """such as d20; by default the newest"""
    step: int | None = None
    """by default the last"""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in"""
    port: int = 8000
    api_key: str | None = None
    """what requests must bring; by default NANOCHAT_API_KEY, which other users of this machine cannot see"""
    allow_origin: list[str] = field(default_factory=list)
    """pages of other servers that may use the API in a browser, such as https://example.org"""
    temperature: float = CHAT_SAMPLING.temperature
    """0 always takes the likeliest token"""
    top_k: int = CHAT_SAMPLING.top_k or 0
    """sample among this many tokens; 0 for all"""
    max_tokens: int = CHAT_SAMPLING.max_tokens
    """longest reply"""
    max_batch_size: int = 16
    """replies written at once by each GPU"""
    max_waiting: int = 64
    """replies that may wait for their turn; more are refused"""
    kv_cache_gb: float | None = None
    """memory for the conversations being answered; by default a quarter of what is free"""
    device_type: str = "auto"
    """auto, cuda or cpu; with several GPUs each has an engine"""

    def __post_init__(self) -> None:
        check_range("max_batch_size", self.max_batch_size, 1)
        check_range("max_waiting", self.max_waiting, 0)


DEMO = Options(temperature=0.3)  # a model of few parameters is only sure of little


def main(options: Options) -> None:
    listener = http_server.bind(options.host, options.port)
    default = ModelCard.of(checkpoint.find(options.source, options.model_tag, options.step))
    device_type = resolve_device_type(options.device_type)
    pool = Pool(
        ModelRegistry(default, trained_models),
        functools.partial(
            load_card,
            device_type=device_type,
            max_batch_size=options.max_batch_size,
            kv_cache_gb=options.kv_cache_gb,
        ),
        gpus=range(torch.cuda.device_count()) if device_type == "cuda" else [None],
        max_waiting=options.max_waiting,
    )
    api_key = options.api_key or os.environ.get("NANOCHAT_API_KEY") or None
    server = http_server.Server()

    def on_loaded(problem: UserError | None) -> None:
        if problem:
            server.stop(problem)
            return
        print(f"{default.description} talks at {http_server.url(listener, options.host)} (Ctrl-C stops)", flush=True)
        if not http_server.is_loopback(listener):
            print(f"on the network: {http_server.lan_address(listener) or 'an address of this machine'}", flush=True)
            if not api_key:
                print(
                    "warning: whoever reaches this machine can talk to the model; --api-key asks for a key",
                    flush=True,
                )

    app = create_app(
        pool,
        Tokenizer.load(paths.tokenizer_dir()),
        defaults=SamplingParams(options.max_tokens, options.temperature, options.top_k or None),
        allowed_hosts=http_server.allowed_hosts(listener, options.host),
        allowed_origins=options.allow_origin,
        api_key=api_key,
        on_loaded=on_loaded,
    )
    server.run(app, listener)


def load_card(card: ModelCard, device_type: str, max_batch_size: int, kv_cache_gb: float | None) -> ChatModel:
    """The model of a card, in the engine's process."""
    return load_chat(
        card.source,
        card.model_tag,
        card.step,
        device_type,
        max_batch_size=max_batch_size,
        kv_cache_gb=kv_cache_gb,
    )


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
