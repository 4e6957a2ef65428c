"""A scripted engine for tests of the server and the terminal chat.

Its reply depends on the last message only, one token per step: `count to N` counts; `calculate`, or any text with 37 in
it, makes a tool call; `wait` generates one word and then pauses until it is cancelled or `go` is set; `fail` raises;
`emoji` and `markdown` return samples of these; anything else is echoed.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from nanochat.conversations import Message, Part
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import TokenLogprob
from nanochat.inference.engine import EngineStats
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Request
from nanochat.serve.model_registry import ModelCard
from nanochat.tokenizer import Tokenizer

CONTEXT = 600
CARD = ModelCard("sft", "d4", 300, CONTEXT)
MARKDOWN = "Some **bold** and $x^2$:\n\n```python\nprint(1)\n```\n\n<img src=x onerror=alert(1)>"
CALL: list[Part] = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "37*45"},
    {"type": "python_output", "text": "1665"},
    {"type": "text", "text": "It is 1665."},
]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """The same in every process."""
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog"], 270)


class ScriptedEngine:
    """The public interface of Engine."""

    def __init__(self, tokenizer: Tokenizer, slots: int = 16, pause: float = 0.0) -> None:
        self.tokenizer = tokenizer
        self.tool = None
        self.slots = slots
        self.pause = pause
        self.go = threading.Event()
        self.on_wait: Callable[[], object] = lambda: None
        self.samplings: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self.cancelled: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._active: dict[Request, Iterator[int | None]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._active)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0)

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        if self._text(prompt) == "refuse":
            raise UserError("this cannot be answered: ask something else")
        request = Request(prompt, sampling, CONTEXT, self.tokenizer)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        if not request.completion.finish_reason:
            self.cancelled.append(request)
        self._active.pop(request, None)
        if request in self._waiting:
            self._waiting.remove(request)

    def step(self) -> None:
        time.sleep(self.pause)
        while self._waiting and len(self._active) < self.slots:
            request = self._waiting.popleft()
            request.completion.prompt_logprobs = [TokenLogprob(token, -0.5, ()) for token in request.tokens[1:]]
            self._active[request] = self._script(self._text(request.tokens))
        for request, script in list(self._active.items()):
            token = next(script)
            if token is None:
                time.sleep(0.002)
                continue
            completion = request.completion
            completion.tokens.append(token)
            if (most := request.sampling.logprobs) is not None:
                completion.logprobs.append(TokenLogprob(token, -0.5, ((token, -0.5), (0, -2.0))[:most]))
            if token == self.tokenizer.special("<|assistant_end|>") or request.found_stop_string():
                completion.finish_reason = "stop"
            elif len(completion.tokens) == request.sampling.max_tokens:
                completion.finish_reason = "length"
            if completion.finish_reason:
                del self._active[request]

    def _text(self, prompt: Sequence[int]) -> str:
        """The last message of a conversation, or a text that is to be continued."""
        text = self.tokenizer.decode(prompt).removeprefix("<|bos|>")
        return text.split("<|user_start|>")[-1].split("<|user_end|>")[0]

    def _script(self, text: str) -> Iterator[int | None]:
        encode, special = self.tokenizer.encode, self.tokenizer.special
        if text.startswith("count to "):
            yield from encode("".join(f"{i + 1} " for i in range(int(text.split()[-1]))))
        elif text == "calculate" or "37" in text:
            *_, end = rendered = self.tokenizer.render_conversation(
                {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": CALL}]}
            ).ids
            yield from rendered[rendered.index(special("<|assistant_start|>")) + 1 :]
            assert end == special("<|assistant_end|>")
        elif text.startswith("wait"):
            yield from encode("well")
            while not self.go.is_set():
                self.on_wait()
                yield None
            yield from encode(" done")
        elif text == "fail":
            raise ZeroDivisionError("a bug")
        elif text == "emoji":
            yield from encode("a\U0001f600é\u20ac!")
        elif text == "markdown":
            yield from encode(MARKDOWN)
        else:
            yield from encode(text)
        yield special("<|assistant_end|>")


class ScriptedChatModel(ChatModel):
    """A chat model with that engine, which notes the conversations it was asked about."""

    engine: ScriptedEngine  # type: ignore[assignment]  # it stands in for the real one

    def __init__(self, tokenizer: Tokenizer | None = None, slots: int = 16, pause: float = 0.0) -> None:
        engine = ScriptedEngine(tokenizer or small_tokenizer(), slots, pause)
        super().__init__("sft", engine, "sft d4 step 300")  # type: ignore[arg-type]
        self.seen: list[tuple[Sequence[Message], SamplingParams]] = []

    @property
    def context(self) -> int:
        return CONTEXT

    def stream(self, messages, sampling, stop=None):  # type: ignore[no-untyped-def]  # as in the class it extends
        self.seen.append((list(messages), sampling))
        return super().stream(messages, sampling, stop)
