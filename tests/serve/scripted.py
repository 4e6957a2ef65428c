"""A chat model that follows a script: the server and the terminal are tested for what they do around a model.

What it says depends on the last message alone:
`count to N` gives N numbers, a token each; `calculate` makes a tool call; `wait` says one word and then
nothing until it is told to stop or `go` is set; `fail` breaks down; anything else is echoed.
"""

import threading
from collections.abc import Generator, Iterator, Sequence

from nanochat.data.conversations import Message
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.reply import Delta
from nanochat.inference.request import Completion
from nanochat.inference.sampling import Sampling


class ScriptedChatModel(ChatModel):
    """Talks without a network of any kind. A character of the prompt is a token, and so is every delta."""

    def __init__(self, pause: float = 0.0) -> None:
        self.source, self.model_tag, self.step = "sft", "d4", 300
        self.pause = pause
        self.go = threading.Event()
        self.started = threading.Event()  # an answer is under way
        self.stopped = threading.Event()  # an answer was broken off
        self.seen: list[tuple[Sequence[Message], Sampling]] = []

    @property
    def context(self) -> int:
        return 2000

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [0 for message in messages for _ in str(message["content"])]

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, stop: threading.Event | None = None
    ) -> Generator[Delta, None, Completion]:
        stop = stop or threading.Event()
        completion = Completion()
        self.seen.append((messages, sampling))
        self.started.set()
        for delta in self._script(str(messages[-1]["content"]), stop):
            if stop.is_set():
                self.stopped.set()
                return completion
            if len(completion.tokens) == sampling.max_tokens:
                completion.finish_reason = "length"
                return completion
            completion.tokens.append(0)
            yield delta
            if self.pause:
                stop.wait(self.pause)
        completion.finish_reason = "stop"
        return completion

    def _script(self, text: str, stop: threading.Event) -> Iterator[Delta]:
        if text.startswith("count to "):
            for i in range(int(text.split()[-1])):
                yield Delta("text", f"{i + 1} ")
        elif text == "calculate" or "37" in text:
            yield Delta("text", "Let me work it out. ")
            yield Delta("python", "37*")
            yield Delta("python", "45")
            yield Delta("python_output", "1665")
            yield Delta("text", "It is 1665.")
        elif text == "wait":
            yield Delta("text", "well")
            while not (stop.wait(0.005) or self.go.is_set()):
                pass
            yield Delta("text", " done")
        elif text == "fail":
            raise ZeroDivisionError("a bug")
        elif text == "refuse":
            raise UserError("this cannot be answered: ask something else")
        else:
            for word in text.split():
                yield Delta("text", f"{word} ")
