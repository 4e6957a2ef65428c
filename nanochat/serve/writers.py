"""Putting a streamed reply on a terminal or into a pipe."""

import unicodedata
from abc import ABC, abstractmethod
from typing import IO

from nanochat.conversations import Part
from nanochat.inference.detokenizer import Delta, add_delta


class ReplyWriter(ABC):
    """Writes text as it comes and each tool call, once its result is there, as `[python] 37*45 -> 1665`."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, delta: Delta) -> None:
        """Write a piece of the reply."""
        if self._in_step() and delta.type not in (self.parts[-1]["type"], "python_output"):
            self._end_step()
        add_delta(self.parts, delta)
        if delta.type == "text":
            self.write_text(printable(delta.text))

    def end(self) -> None:
        """Write what is still held back, and end the line."""
        if self._in_step():
            self._end_step()
        self.end_line()

    @abstractmethod
    def write_text(self, text: str) -> None:
        """Write a piece of text, which may begin or end inside a word."""

    @abstractmethod
    def write_step(self, line: str) -> None:
        """Write one tool call on a line of its own."""

    @abstractmethod
    def end_line(self) -> None:
        """Go to the start of a line, unless already there."""

    def _in_step(self) -> bool:
        return bool(self.parts) and self.parts[-1]["type"] != "text"

    def _end_step(self) -> None:
        *_, code, result = [{"type": "", "text": ""}, *self.parts]
        if result["type"] == "python":  # the reply ended inside the call
            code, result = result, {"type": "python_output", "text": "(not run)"}
        self.end_line()
        self.write_step(f"[python] {one_line(printable(code['text']))} -> {one_line(printable(result['text']))}")


class PlainWriter(ReplyWriter):
    """For a file, a pipe or a terminal that can do no more: the text as it is."""

    def __init__(self, out: IO[str]) -> None:
        super().__init__()
        self.out = out
        self.at_start = True

    def write_text(self, text: str) -> None:
        if text:
            self.out.write(text)
            self.out.flush()
            self.at_start = text.endswith("\n")

    def write_step(self, line: str) -> None:
        self.write_text(f"{line}\n")

    def end_line(self) -> None:
        if not self.at_start:
            self.write_text("\n")


def one_line(code: str) -> str:
    """Code as it fits on one line."""
    return "; ".join(line.rstrip() for line in code.strip().splitlines() if line.strip())


def printable(text: str) -> str:
    """Text without the control characters with which it could move the cursor or rename the window."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
