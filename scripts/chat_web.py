"""Talk to a model in the browser: `./chat.sh`, or python -m scripts.chat_web --port 8000."""

from dataclasses import dataclass

from nanochat import cli
from nanochat.inference.chat import load_chat
from nanochat.inference.sampling import Sampling
from nanochat.serve import listen
from nanochat.serve.app import create_app


@dataclass
class Options:
    """Serve the chat page and OpenAI's API."""

    source: str | None = None  # base, mid, sft or rl; by default the most advanced there is
    model_tag: str | None = None  # such as d20; by default the newest
    step: int | None = None  # by default the last
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in
    port: int = 8000
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 50  # sample among this many tokens; 0 for all
    max_tokens: int = 512  # longest reply
    max_waiting: int = 16  # requests that may wait for their turn
    device_type: str = "auto"  # cuda, mps or cpu


DEMO = Options(temperature=0.3)  # a model of few parameters is only sure of little


def main(options: Options) -> None:
    listener = listen.bind(options.host, options.port)  # before the model, which takes longer to load
    chat_model = load_chat(options.source, options.model_tag, options.step, options.device_type, max_batch_size=1)
    sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k or None)
    app = create_app(
        chat_model,
        defaults=sampling,
        max_waiting=options.max_waiting,
        allowed_hosts=listen.allowed_hosts(listener, options.host),
    )
    print(f"{chat_model.description} talks at {listen.url(listener, options.host)} (Ctrl-C stops)", flush=True)
    if not listen.is_loopback(listener):
        print("warning: everyone who can reach this machine over the network can talk to the model", flush=True)
    listen.serve(app, listener)


if __name__ == "__main__":
    cli.run(main, Options, demo=DEMO)
