"""Chat in a terminal: reads with prompt_toolkit, writes with rich, as the model makes the words."""

import contextlib
import dataclasses
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from nanochat.data.conversations import Message, Part
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.sampling import Sampling
from nanochat.serve.markdown import MarkdownWriter
from nanochat.serve.writers import PlainWriter, ReplyWriter

HELP = """\
/system TEXT       tell the model how to behave; without TEXT, forget it
/temperature X     0 always takes the likeliest word, 1 is freer
/topk N            choose among N words; 0 for all
/clear             begin a new conversation
/help              this list
/exit              leave (so does Ctrl-D)
Enter sends, Alt-Enter or Esc Enter starts a new line, Ctrl-C stops a reply."""


def answer_once(chat_model: ChatModel, prompt: str, sampling: Sampling, system: str | None = None) -> None:
    """One answer on stdout as plain text, a tool call on a line of its own: `[python] 37*45 -> 1665`.

    Raises UserError if the prompt does not fit the context. Ends quietly when the reader of a pipe has left.
    """
    try:
        writer = PlainWriter(sys.stdout)
        for delta in chat_model.stream([*_opening(system), _turn("user", prompt)], sampling):
            writer.add(delta)
        writer.end()
    except BrokenPipeError:
        # Python flushes stdout once more as it exits: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TerminalChat:
    """A conversation with a person at the keyboard."""

    def __init__(
        self,
        chat_model: ChatModel,
        sampling: Sampling,
        read: Callable[[], str],
        console: Console,
        system: str | None = None,
    ) -> None:
        """`read` returns what the person typed; it raises EOFError to leave and KeyboardInterrupt on Ctrl-C."""
        self.chat_model = chat_model
        self.sampling = sampling
        self.read = read
        self.console = console
        self.system = system
        self.messages: list[Message] = []

    def run(self) -> None:
        """Talk until the person leaves."""
        self._say(f"{self.chat_model.description}. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                text = self.read().strip()
            except KeyboardInterrupt:
                self._say("Ctrl-D or /exit leaves.")
                continue
            except EOFError:
                return
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._say(self._command(text))
            elif text:
                self._answer(text)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def _command(self, text: str) -> str:
        """Do what a line that starts with a slash asks; returns what to tell the person."""
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "/help":
            return HELP
        if name == "/clear":
            self.messages.clear()
            return "A new conversation."
        if name == "/system":
            self.system = value or None
            self.messages.clear()
            return "A new conversation with this system message." if value else "A new conversation, no system message."
        if name == "/temperature":
            number = _number(value, 0, 2)
            if number is None:
                return f"/temperature takes a number from 0 to 2; it is {self.sampling.temperature:g} now."
            self.sampling = dataclasses.replace(self.sampling, temperature=number)
            return f"The temperature is {number:g} from now on."
        if name == "/topk":
            number = _number(value, 0, 1_000_000)
            if number is None or not number.is_integer():
                return f"/topk takes a whole number, 0 for no limit; it is {self.sampling.top_k or 0} now."
            self.sampling = dataclasses.replace(self.sampling, top_k=int(number) or None)
            return f"Top-k is {int(number)} from now on." if number else "There is no top-k limit from now on."
        return f"There is no command {name}: /help lists them."

    def _answer(self, text: str) -> None:
        conversation = [*_opening(self.system), *self.messages, _turn("user", text)]
        sampling = dataclasses.replace(self.sampling, seed=secrets.randbits(31))
        rich_terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        writer: ReplyWriter = MarkdownWriter(self.console) if rich_terminal else PlainWriter(self.console.file)
        try:
            with _ctrl_c_sets() as stop:
                try:
                    for delta in self.chat_model.stream(conversation, sampling, stop):
                        writer.add(delta)
                finally:
                    writer.end()  # also gives the cursor back
        except UserError as error:
            self._say(f"{error} (/clear begins a new conversation)")
            return
        if stop.is_set():
            self._say("(stopped)")
        if writer.parts:
            self.messages += [_turn("user", text), _turn("assistant", writer.parts)]
        self.console.print()


def keyboard(history: Path) -> Callable[[], str]:
    """Reads from the terminal, with line editing, several lines and a history that outlives the program.

    Raises UserError if stdin is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError("the chat needs a terminal to read from: pass -p TEXT for one answer")
    # What a person asked is private: only they may read the file.
    os.close(os.open(history, os.O_CREAT | os.O_APPEND, 0o600))
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def discard(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)), multiline=True, key_bindings=keys, prompt_continuation="  "
    )
    return lambda: session.prompt(HTML("<b>&gt; </b>"))


@contextlib.contextmanager
def _ctrl_c_sets() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets inside the block; a second Ctrl-C interrupts the program after all."""
    stop = threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _number(text: str, low: float, high: float) -> float | None:
    """The number in `text` if it is one and from `low` to `high`."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if low <= number <= high else None


def _opening(system: str | None) -> list[Message]:
    return [_turn("system", system)] if system else []


def _turn(role: Literal["system", "user", "assistant"], content: str | list[Part]) -> Message:
    return {"role": role, "content": content}
