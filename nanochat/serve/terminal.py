"""Chat in a terminal: reads with prompt_toolkit, writes with rich, as the model makes the words."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from nanochat import conversations
from nanochat.conversations import Message, Part, text_of
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import Delta, add_delta
from nanochat.inference.request import Completion
from nanochat.inference.sampling_params import SamplingParams
from nanochat.runtime import is_out_of_memory, release_memory
from nanochat.serve.markdown import MarkdownWriter
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.writers import PlainWriter, ReplyWriter

HELP = """\
/model [NAME]      list the trained models; talk to another
/system TEXT       tell the model how to behave; without TEXT, forget it
/temperature X     0 always takes the likeliest word, 1 is freer
/topk N            choose among N words; 0 for all
/retry             another reply to the last message
/save FILE         add the conversation to a file
/load FILE         go on with the last conversation of a file
/clear             begin a new conversation
/help              this list
/exit              leave (so does Ctrl-D)
Enter sends, Alt-Enter or Esc Enter starts a new line, Ctrl-C stops a reply."""


class Reply:
    """A reply being written: iterate over its deltas; then it knows how long it took."""

    def __init__(
        self,
        chat_model: ChatModel,
        messages: list[Message],
        sampling: SamplingParams,
        stop: threading.Event | None = None,
    ) -> None:
        self.messages = messages
        self.stream = chat_model.stream(messages, sampling, stop)
        self.prompt_tokens = len(chat_model.prompt(messages))
        self.completion: Completion | None = None
        """None until the reply has ended; without a finish_reason if it was stopped"""
        self.seconds = 0.0
        """from the first token to the last"""

    def __iter__(self) -> Iterator[Delta]:
        first = None
        while True:
            try:
                delta = next(self.stream)
            except StopIteration as end:
                self.completion = end.value
                break
            first = first or time.monotonic()
            yield delta
        if first:
            self.seconds = time.monotonic() - first

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return len(self.completion.tokens) if self.completion else 0

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None where there is nothing to measure."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else None


def answer_once(
    chat_model: ChatModel, prompt: str, sampling: SamplingParams, system: str | None = None, as_json: bool = False
) -> None:
    """One answer on stdout as plain text, a tool call on a line of its own: `[python] 37*45 -> 1665`.

    as_json: one line of JSON instead, once the answer is complete.
    Raises UserError if the prompt does not fit the context. Ends quietly when the reader of a pipe has left.
    """
    reply = Reply(chat_model, [*_opening(system), _turn("user", prompt)], sampling)
    with _ends_without_a_reader():
        if as_json:
            print(json.dumps(_report(chat_model, reply), ensure_ascii=False), flush=True)
            return
        writer = PlainWriter(sys.stdout)
        for delta in reply:
            writer.add(delta)
        writer.end()


@contextlib.contextmanager
def _ends_without_a_reader() -> Iterator[None]:
    """Ends its block quietly when the reader of stdout has left."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout once more as it exits: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(chat_model: ChatModel, reply: Reply) -> dict[str, Any]:
    parts: list[Part] = []
    for delta in reply:
        add_delta(parts, delta)
    return {
        "model": chat_model.description,
        "text": text_of(_turn("assistant", parts)),
        "parts": parts,
        "finish_reason": reply.completion.finish_reason if reply.completion else None,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "tokens_per_second": round(reply.tokens_per_second, 1) if reply.tokens_per_second else None,
    }


class TerminalChat:
    """A conversation with a person at the keyboard."""

    def __init__(
        self,
        menu: ModelRegistry,
        load: Callable[[ModelCard], ChatModel],
        sampling: SamplingParams,
        read: Callable[[], str],
        console: Console,
        system: str | None = None,
    ) -> None:
        """`read` returns what the person typed; it raises EOFError to leave and KeyboardInterrupt on Ctrl-C.

        Raises UserError if the menu's default cannot be loaded.
        """
        self.menu = menu
        self.load = load
        self.card = menu.default
        self.chat_model: ChatModel | None = load(self.card)
        """None where neither the model that was asked for can be loaded nor the one before"""
        self.sampling = sampling
        self.read = read
        self.console = console
        self.system = system
        self.messages: list[Message] = []
        self._commands: dict[str, Callable[[str], str | None]] = {
            "/help": lambda value: HELP,
            "/model": self._model,
            "/system": self._system,
            "/temperature": self._temperature,
            "/topk": self._top_k,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
        }

    def run(self) -> None:
        """Talk until the person leaves, or what shows it to them."""
        with _ends_without_a_reader():
            self._talk()

    def _talk(self) -> None:
        nature = ", which continues your text and knows no conversation" if self.card.source == "base" else ""
        self._say(f"{self.card.description}{nature}. /help lists the commands, Ctrl-D leaves.")
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
                self._command(text)
            elif text:
                self._answer(text)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def _command(self, text: str) -> None:
        """Do what a line that starts with a slash asks, and tell the person."""
        name, _, value = text.partition(" ")
        command = self._commands.get(name)
        try:
            told = command(value.strip()) if command else f"There is no command {name}: /help lists them."
        except UserError as error:
            told = str(error)
        if told:
            self._say(told)

    def _model(self, name: str) -> str:
        cards = self.menu.cards()
        if not name:
            now = self.card.description if self.chat_model else None
            lines = [f"{'>' if card.description == now else ' '} {card.id:<24} {card.description}" for card in cards]
            return "\n".join([*lines, "/model NAME talks to another."])
        card = next((card for card in cards if name in (card.id, card.source, card.description)), None)
        if card is None:
            return f"There is no model {name}: /model lists those there are."
        before = self.card
        problem = self._use(card)
        if problem is None:
            return f"{card.description} {'continues your text' if card.source == 'base' else 'answers'} from now on."
        if self._use(before) is None:
            return f"{problem}. {before.description} goes on answering."
        return f"{problem}. Nor can {before.description} be loaded any more: /model NAME takes another."

    def _use(self, card: ModelCard) -> str | None:
        """Load a model once the one before is gone, for which many a machine has no room beside it.

        Gives what is wrong with it; there is no model then.
        """
        self.chat_model = None
        release_memory()
        try:
            self.chat_model, self.card = self.load(card), card
        except UserError as error:
            return str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return f"there is too little memory for {card.description}"
        return None

    def _clear(self, value: str) -> str:
        self.messages.clear()
        return "A new conversation."

    def _system(self, text: str) -> str:
        self.system = text or None
        self.messages.clear()
        return "A new conversation with this system message." if text else "A new conversation, no system message."

    def _temperature(self, value: str) -> str:
        number = _number(value, 0, 2)
        if number is None:
            return f"/temperature takes a number from 0 to 2; it is {self.sampling.temperature:g} now."
        self.sampling = dataclasses.replace(self.sampling, temperature=number)
        return f"The temperature is {number:g} from now on."

    def _top_k(self, value: str) -> str:
        number = _number(value, 0, 1_000_000)
        if number is None or not number.is_integer():
            return f"/topk takes a whole number, 0 for no limit; it is {self.sampling.top_k or 0} now."
        self.sampling = dataclasses.replace(self.sampling, top_k=int(number) or None)
        return f"Top-k is {int(number)} from now on." if number else "There is no top-k limit from now on."

    def _retry(self, value: str) -> str | None:
        if not self.messages:
            return "There is nothing to retry yet."
        before = self.messages
        *self.messages, question, _ = before
        self._answer(text_of(question))
        if len(self.messages) < len(before):  # nothing came
            self.messages = before
        return None

    def _save(self, name: str) -> str:
        if not name or not self.messages:
            return "/save takes the name of a file." if self.messages else "There is nothing to save yet."
        path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
        try:
            conversations.append(path, [{"messages": [*_opening(self.system), *self.messages]}])
        except ValueError as error:  # a reply that was stopped before its first word, say
            return f"This conversation cannot be saved: {error}."
        return f"Added to {path}."

    def _load(self, name: str) -> str:
        if not name:
            return "/load takes the name of a file."
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            return f"There is no file {path}."
        *_, last = conversations.read(Path(path))
        messages = list(last["messages"])
        self.system = str(messages.pop(0)["content"]) if messages[0]["role"] == "system" else None
        self.messages = messages
        return f"{len(messages)} messages; the last one of them:\n{text_of(messages[-1])}"

    def _answer(self, text: str) -> None:
        if self.chat_model is None:
            self._say("There is no model to answer: /model lists those there are.")
            return
        conversation = [*_opening(self.system), *self.messages, _turn("user", text)]
        sampling = dataclasses.replace(self.sampling, seed=secrets.randbits(31))
        rich_terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        writer: ReplyWriter = MarkdownWriter(self.console) if rich_terminal else PlainWriter(self.console.file)
        try:
            with _ctrl_c_sets() as stop:
                reply = Reply(self.chat_model, conversation, sampling, stop)
                try:
                    for delta in reply:
                        writer.add(delta)
                finally:
                    writer.end()  # also gives the cursor back
        except UserError as error:
            self._say(f"{error} (/clear begins a new conversation)")
            return
        speed = f", {reply.tokens_per_second:.0f} tokens/s" if reply.tokens_per_second else ""
        self._say(f"({'stopped, ' if stop.is_set() else ''}{reply.tokens} tokens{speed})")
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
