"""Serve the chat page and an OpenAI-compatible API: `./chat.sh`, or python -m scripts.chat_web --port 8000."""

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
from nanochat.serve.pool import EnginePool
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.options import check_range


@dataclass
class Options:
    """Serve the chat page and an OpenAI-compatible API."""

    source: str | None = None
    """base, mid, sft or rl; default: the most advanced stage"""
    model_tag: str | None = None
    """model, such as d20; default: the newest"""
    step: int | None = None
    """checkpoint; default: the last"""
    host: str = "127.0.0.1"
    """0.0.0.0 makes the server reachable from other machines"""
    port: int = 8000
    api_key: str | None = None
    """key that requests must send; default: NANOCHAT_API_KEY, which other users of this machine cannot see"""
    allow_host: list[str] = field(default_factory=list)
    """other names of this server, such as spark.example.ts.net, behind Tailscale or a reverse proxy"""
    allow_origin: list[str] = field(default_factory=list)
    """origins of other sites that may use the API in a browser, such as https://example.org"""
    temperature: float = CHAT_SAMPLING.temperature
    """0 is greedy"""
    top_k: int = CHAT_SAMPLING.top_k or 0
    """sample from this many most likely tokens; 0: all"""
    max_tokens: int = CHAT_SAMPLING.max_tokens
    """maximum length of a reply"""
    max_batch_size: int = 16
    """maximum number of replies generated at once per GPU"""
    max_waiting: int = 64
    """maximum number of replies in the queue; further requests are rejected"""
    kv_cache_gb: float | None = None
    """size of the KV cache in GB; default: a quarter of the free memory"""
    device_type: str = "auto"
    """auto, cuda or cpu; one engine per GPU"""

    def __post_init__(self) -> None:
        check_range("max_batch_size", self.max_batch_size, 1)
        check_range("max_waiting", self.max_waiting, 0)


DEMO = Options(temperature=0.3)  # small models need a low temperature


def main(options: Options) -> None:
    listener = http_server.bind(options.host, options.port)
    default = ModelCard.from_checkpoint(checkpoint.find(options.source, options.model_tag, options.step))
    device_type = resolve_device_type(options.device_type)
    load = functools.partial(
        load_model, device_type=device_type, max_batch_size=options.max_batch_size, kv_cache_gb=options.kv_cache_gb
    )
    pool = EnginePool(
        ModelRegistry(default, trained_models),
        load,
        gpus=range(torch.cuda.device_count()) if device_type == "cuda" else [None],
        max_waiting=options.max_waiting,
    )
    api_key = options.api_key or os.environ.get("NANOCHAT_API_KEY") or None

    def on_loaded(error: UserError | None) -> None:
        if error:
            server.stop(error)
            return
        url = http_server.url(listener, options.host)
        print(f"Serving {default.description} at {url} (Ctrl-C to stop)", flush=True)
        if not http_server.is_loopback(listener):
            lan_url = http_server.lan_url(listener) or "this machine's address"
            print(f"On the network: {lan_url}", flush=True)
            if not api_key:
                print("warning: anyone on the network can use the model; set --api-key to require a key", flush=True)

    app = create_app(
        pool,
        Tokenizer.load(paths.tokenizer_dir()),
        defaults=SamplingParams(options.max_tokens, options.temperature, options.top_k or None),
        allowed_hosts=http_server.allowed_hosts(listener, options.host, options.allow_host),
        allowed_origins=options.allow_origin,
        api_key=api_key,
        on_loaded=on_loaded,
    )
    server = http_server.Server(app, pool.stop)
    server.run_on(listener)


def load_model(card: ModelCard, device_type: str, max_batch_size: int, kv_cache_gb: float | None) -> ChatModel:
    """Load a model in the engine process."""
    found = checkpoint.find(card.source, card.model_tag, card.step)
    return load_chat(found, device_type, max_batch_size, kv_cache_gb)


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
