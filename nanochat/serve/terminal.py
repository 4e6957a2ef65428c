"""Chat in the terminal, with prompt_toolkit for input and rich for output."""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from nanochat import conversation_files
from nanochat.conversations import Message, Part, text_of
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import Delta
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Completion
from nanochat.runtime import is_out_of_memory, release_memory
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.terminal_output import MarkdownPrinter, PlainPrinter

HELP = """\
/model [NAME]      list the trained models, or switch to another one
/system [TEXT]     set or remove the system message and start a new conversation
/temperature X     0 is greedy, 1 is the model's own distribution
/topk N            sample from the N most likely tokens; 0: all
/retry             regenerate the last reply
/save FILE         append the conversation to a JSON Lines file
/load FILE         continue the last conversation in a file
/clear             start a new conversation
/help              show this list
/exit              quit (also Ctrl-D)
Enter sends, Alt-Enter or Esc Enter inserts a line break, Ctrl-C stops a reply."""


def stream_reply(
    reply: Generator[Delta, None, Completion], on_delta: Callable[[Delta], None]
) -> tuple[Completion, float | None]:
    """Pass the deltas of a reply to `on_delta`. Return the completion and its tokens/s after the first token."""
    start = None
    while True:
        try:
            delta = next(reply)
        except StopIteration as end:
            completion: Completion = end.value
            break
        start = start or time.monotonic()
        on_delta(delta)
    num_tokens, seconds = len(completion.tokens), time.monotonic() - (start or time.monotonic())
    return completion, (num_tokens - 1) / seconds if num_tokens > 1 and seconds > 0 else None


def answer_once(
    chat_model: ChatModel, prompt: str, sampling: SamplingParams, system: str | None = None, as_json: bool = False
) -> None:
    """Print one reply to stdout: as plain text while it is generated, or as one line of JSON. Raises as `stream`."""
    messages = [*_system_message(system), _message("user", prompt)]
    printer = PlainPrinter(io.StringIO() if as_json else sys.stdout)
    with _ignore_broken_pipe():
        completion, speed = stream_reply(chat_model.stream(messages, sampling), printer.add)
        printer.end()
        if not as_json:
            return
        result = {
            "model": chat_model.description,
            "text": text_of(_message("assistant", printer.parts)),
            "parts": printer.parts,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(chat_model.prompt(messages)),
            "completion_tokens": len(completion.tokens),
            "tokens_per_second": round(speed, 1) if speed else None,
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def _ignore_broken_pipe() -> Iterator[None]:
    """Exit the block quietly if the reader of stdout is gone."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout again at exit: redirect it to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TerminalChat:
    """An interactive conversation."""

    def __init__(
        self,
        registry: ModelRegistry,
        load: Callable[[ModelCard], ChatModel],
        sampling: SamplingParams,
        read: Callable[[], str],
        console: Console,
        system: str | None = None,
    ) -> None:
        """read: returns the user's input; raises EOFError at its end and KeyboardInterrupt on Ctrl-C.

        Raises UserError if the default model cannot be loaded.
        """
        self.registry = registry
        self.load = load
        self.card = registry.default
        self.chat_model: ChatModel | None = load(self.card)  # None after a failed switch without a way back
        self.sampling = sampling
        self.read = read
        self.console = console
        self.system = system
        self.messages: list[Message] = []
        self._commands: dict[str, Callable[[str], str | None]] = {
            "/help": lambda value: HELP,
            "/model": self._model,
            "/system": self._system,
            "/temperature": lambda value: self._set("temperature", float, value),
            "/topk": lambda value: self._set("top_k", int, value),
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
        }

    def run(self) -> None:
        with _ignore_broken_pipe():
            self._print(f"{_describe(self.card)}. Type /help for commands, Ctrl-D to quit.")
            while True:
                try:
                    text = self.read().strip()
                except KeyboardInterrupt:
                    self._print("Press Ctrl-D or type /exit to quit.")
                    continue
                except EOFError:
                    return
                if text in ("/exit", "/quit"):
                    return
                if text.startswith("/"):
                    self._run_command(text)
                elif text:
                    self._answer(text)

    def _print(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def _run_command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        command = self._commands.get(name)
        try:
            output = command(value.strip()) if command else f"Unknown command {name}. Type /help for a list."
        except UserError as error:
            output = str(error)
        if output:
            self._print(output)

    def _model(self, name: str) -> str:
        cards = self.registry.cards()
        if not name:
            current = self.card if self.chat_model else None
            lines = [f"{'>' if card == current else ' '} {card.id:<24} {card.description}" for card in cards]
            return "\n".join([*lines, "Switch with /model NAME."])
        card = next((card for card in cards if name in (card.id, card.source, card.description)), None)
        if card is None:
            return f"Unknown model {name}. Type /model for a list."
        previous = self.card
        try:
            self._use(card)
            return f"Now using {_describe(card)}."
        except UserError as error:
            message = str(error)
        try:  # outside the except block, whose traceback would keep the failed model in memory
            self._use(previous)
            return f"{message}. Still using {previous.description}."
        except UserError:
            return f"{message}. {previous.description} can no longer be loaded either: choose one with /model NAME."

    def _use(self, card: ModelCard) -> None:
        """Free the current model, then load another: many machines lack memory for both. Raises UserError."""
        self.chat_model = None
        release_memory()
        try:
            self.chat_model, self.card = self.load(card), card
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"not enough memory for {card.description}") from error

    def _clear(self, value: str) -> str:
        self.messages.clear()
        return "New conversation."

    def _system(self, text: str) -> str:
        self.system = text or None
        self.messages.clear()
        return "New conversation with this system message." if text else "New conversation without a system message."

    def _set(self, name: Literal["temperature", "top_k"], convert: Callable[[str], Any], value: str) -> str:
        try:
            self.sampling = dataclasses.replace(self.sampling, **{name: convert(value)})
        except ValueError:
            return f"{name} must be a number; current value: {getattr(self.sampling, name)}."
        return f"{name} set to {value}."

    def _retry(self, value: str) -> str | None:
        if not self.messages:
            return "No message to retry."
        before = self.messages
        *self.messages, question, _ = before
        self._answer(text_of(question))
        if len(self.messages) < len(before):  # no reply: keep the old one
            self.messages = before
        return None

    def _save(self, name: str) -> str:
        if not name or not self.messages:
            return "Usage: /save FILE." if self.messages else "Nothing to save yet."
        path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
        try:
            conversation_files.append(path, [{"messages": [*_system_message(self.system), *self.messages]}])
        except ValueError as error:  # such as a reply that was stopped before its first word
            return f"Cannot save this conversation: {error}."
        return f"Appended to {path}."

    def _load(self, name: str) -> str:
        if not name:
            return "Usage: /load FILE."
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            return f"File not found: {path}."
        *_, last = conversation_files.read(Path(path))
        messages = list(last["messages"])
        self.system = str(messages.pop(0)["content"]) if messages[0]["role"] == "system" else None
        self.messages = messages
        return f"Loaded {len(messages)} messages. The last one:\n{text_of(messages[-1])}"

    def _answer(self, text: str) -> None:
        if self.chat_model is None:
            self._print("No model is loaded. Type /model for a list.")
            return
        conversation = [*_system_message(self.system), *self.messages, _message("user", text)]
        sampling = dataclasses.replace(self.sampling, seed=secrets.randbits(31))
        can_redraw = self.console.is_terminal and not self.console.is_dumb_terminal
        printer = MarkdownPrinter(self.console) if can_redraw else PlainPrinter(self.console.file)
        try:
            with _stop_on_ctrl_c() as stop:
                try:
                    reply = self.chat_model.stream(conversation, sampling, stop)
                    completion, speed = stream_reply(reply, printer.add)
                finally:
                    printer.end()  # also restores the cursor
        except UserError as error:
            self._print(f"{error} (/clear starts a new conversation)")
            return
        speed_text = f", {speed:.0f} tokens/s" if speed else ""
        self._print(f"({'stopped, ' if stop.is_set() else ''}{len(completion.tokens)} tokens{speed_text})")
        if printer.parts:
            self.messages += [_message("user", text), _message("assistant", printer.parts)]
        self.console.print()


def keyboard(history: Path) -> Callable[[], str]:
    """Return a function that reads a message, with line editing and history. Raises UserError without a terminal."""
    if not sys.stdin.isatty():
        raise UserError("stdin is not a terminal: pass -p TEXT for a single answer")
    kept: History = InMemoryHistory()
    with contextlib.suppress(OSError):  # a read-only base directory
        os.close(os.open(history, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))  # readable by its owner only
        kept = FileHistory(str(history))
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
        history=kept, multiline=True, key_bindings=keys, prompt_continuation="  "
    )
    return lambda: session.prompt(HTML("<b>&gt; </b>"))


@contextlib.contextmanager
def _stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _describe(card: ModelCard) -> str:
    return f"{card.description}{' (a base model: it continues your text)' if card.source == 'base' else ''}"


def _system_message(system: str | None) -> list[Message]:
    return [_message("system", system)] if system else []


def _message(role: Literal["system", "user", "assistant"], content: str | list[Part]) -> Message:
    return {"role": role, "content": content}
