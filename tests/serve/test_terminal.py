"""The terminal chat: output, commands and interruption."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nanochat import conversation_files
from nanochat.conversations import PartType
from nanochat.errors import UserError
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import Delta
from nanochat.inference.sampling_params import SamplingParams
from nanochat.serve.model_registry import ModelCard, ModelRegistry
from nanochat.serve.terminal import TerminalChat, answer_once, keyboard
from nanochat.serve.terminal_output import MarkdownPrinter, PlainPrinter
from tests.serve.scripted import CARD, CONTEXT, ScriptedChatModel

BASE = ModelCard("base", "d4", 9, CONTEXT)


def talk(
    typed: Iterable[str | BaseException],
    model: ScriptedChatModel | None = None,
    load: Callable[[ModelCard], ChatModel] | None = None,
) -> tuple[str, TerminalChat]:
    """Return the output of a 40-column terminal after these inputs."""
    lines = iter(typed)

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    registry = ModelRegistry(CARD, lambda: [CARD, BASE])
    only = model or ScriptedChatModel()
    chat = TerminalChat(registry, load or (lambda card: only), SamplingParams(), read, Console(file=out, width=40))
    chat.run()
    return out.getvalue(), chat


def test_first_line_names_the_model() -> None:
    assert talk([])[0].startswith("sft d4 step 300. ")


def test_conversation_keeps_its_history() -> None:
    model = ScriptedChatModel()
    talk(["hello", "calculate", "bye"], model)
    messages, _ = model.seen[-1]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[1]["content"] == [{"type": "text", "text": "hello"}]
    assert {"type": "python_output", "text": "1665"} in messages[3]["content"]


def test_tool_call_stands_on_a_line_of_its_own() -> None:
    shown, _ = talk(["calculate"])
    assert "Let me see. \n[python] 37*45 -> 1665\nIt is 1665.\n" in shown


def test_commands_set_what_the_next_reply_uses() -> None:
    model = ScriptedChatModel()
    talk(["/temperature 0.3", "/topk 5", "/system be brief", "hello", "/topk 0", "/clear", "hi"], model)
    (first, sampling), (second, later) = model.seen
    assert (sampling.temperature, sampling.top_k) == (0.3, 5)
    assert first == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert later.top_k == 0
    assert second == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("typed", "output"),
    [
        ("/dance", "/dance"),
        ("/temperature hot", "temperature must be a number"),
        ("/temperature nan", "temperature must be"),
        ("/temperature -1", "temperature must be"),
        ("/topk 1.5", "top_k must be"),
        ("/topk", "50"),
        ("/help", "/system [TEXT]"),
        (KeyboardInterrupt(), "Ctrl-D"),
        ("refuse", "this cannot be answered"),
    ],
)
def test_mistakes_print_a_message_and_the_chat_continues(typed: str | BaseException, output: str) -> None:
    model = ScriptedChatModel()
    shown, _ = talk([typed, "hello"], model)
    assert output in " ".join(shown.split())
    assert model.seen[-1][0] == [{"role": "user", "content": "hello"}]


def test_exit_leaves_at_once() -> None:
    model = ScriptedChatModel()
    talk(["/exit", "hello"], model)
    assert not model.seen


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    model = ScriptedChatModel()
    model.engine.on_wait = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    shown, chat = talk(["wait", "hello"], model)
    assert "well\n(stopped, " in shown and "hello" in shown
    assert chat.messages[1]["content"] == [{"type": "text", "text": "well"}]
    assert signal.getsignal(signal.SIGINT) is before


def test_speed_stands_below_the_reply() -> None:
    assert re.search(r"\(\d+ tokens, \d+ tokens/s\)", talk(["count to 9"])[0])


def test_retry_asks_the_same_again_and_keeps_the_new_reply_only() -> None:
    model = ScriptedChatModel()
    shown, chat = talk(["/retry", "one", "two", "/retry"], model)
    assert "No message to retry" in shown
    assert [messages[-1]["content"] for messages, _ in model.seen] == ["one", "two", "two"]
    assert len(chat.messages) == 4 and len(model.seen[-1][0]) == 3
    assert model.seen[1][1].seed != model.seen[2][1].seed


def test_conversation_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    talk([f"/save {path}", "/system be brief", "one", f"/save {path}", "calculate", f"/save {path}"])
    assert len(conversation_files.read(path)) == 2
    model = ScriptedChatModel()
    shown, chat = talk([f"/load {path}", "again"], model)
    assert "4 messages" in shown and "It is 1665." in shown and chat.system == "be brief"
    assert [message["role"] for message in model.seen[-1][0]] == ["system", *["user", "assistant"] * 2, "user"]


def test_invalid_files_print_a_message(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{")
    shown, _ = talk([f"/load {tmp_path / 'broken'}", "/load", "hello", "/save", f"/save {tmp_path}", "/load /no/where"])
    output = " ".join(shown.split())
    sentences = "line 1 of", "/load FILE", "/save FILE", "Is a directory", "/no/where"
    for sentence in sentences:
        assert sentence in output


def test_switching_models() -> None:
    shown, _ = talk(["/model", "/model base", "/model x", "hello"])
    assert "> nanochat-d4-sft" in shown and "  nanochat-d4-base" in shown
    assert "Now using base d4 step 9" in shown and "Unknown model x" in shown


class Shelf:
    """Loads models, and notes how many were there when the next one came."""

    def __init__(self, broken: Mapping[ModelCard, Iterable[Exception | None]]) -> None:
        """`broken`: what goes wrong with a model at each time it is loaded."""
        self.broken = {card: iter(errors) for card, errors in broken.items()}
        self.loaded: weakref.WeakSet[Model] = weakref.WeakSet()
        self.loaded_before: list[int] = []

    def load(self, card: ModelCard) -> ChatModel:
        self.loaded_before.append(len(self.loaded))
        error = next(self.broken.get(card, iter(())), None)
        if error:
            raise error
        model = Model(card)
        self.loaded.add(model)
        return model


class Model(ScriptedChatModel):
    __hash__ = object.__hash__

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.source, self.step = card.source, card.step


@pytest.mark.parametrize("error", [UserError("base d4 is damaged"), torch.OutOfMemoryError("CUDA out of memory")])
def test_switching_frees_the_model_first_and_reloads_it_on_failure(error: Exception) -> None:
    shelf = Shelf({BASE: [error]})
    shown, chat = talk(["one", "/model base", "two", "/model base", "/model sft"], load=shelf.load)
    output = " ".join(shown.split())
    assert ("base d4 is damaged." in output) or ("not enough memory for base d4 step 9." in output)
    assert "Still using sft d4 step 300." in output and "Now using base d4 step 9" in output
    assert shelf.loaded_before == [0, 0, 0, 0, 0] and len(chat.messages) == 4


def test_chat_continues_without_a_model_until_another_is_loaded() -> None:
    shelf = Shelf({BASE: [UserError("base is gone")], CARD: [None, UserError("sft is gone too")]})
    shown, chat = talk(["/model base", "hello", "/model", "/model base", "hi"], load=shelf.load)
    output = " ".join(shown.split())
    assert "base is gone. sft d4 step 300" in output and "/model NAME" in output
    assert "No model is loaded" in output and ">" not in output
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def screen(*deltas: str | Delta, width: int = 40) -> str:
    """Return the final screen after a reply of these pieces, without colors."""
    out = io.StringIO()
    writer = MarkdownPrinter(Console(file=out, width=width, force_terminal=True, color_system=None))
    for delta in deltas:
        writer.add(Delta("text", delta) if isinstance(delta, str) else delta)
    writer.end()
    return after_erasing(out.getvalue())


def after_erasing(written: str) -> str:
    """Follows the cursor: to redraw lines, rich goes up and erases them (ESC [1A, ESC [2K)."""
    lines, row = [""], 0
    for code, text in re.findall(r"\x1b\[([0-9?;]*[A-Za-z])|([^\x1b])", written):
        if code == "1A":
            row -= 1
        elif code == "2K" or text == "\r":
            lines[row] = ""
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] += text
    return "\n".join(line.rstrip() for line in lines[: row + 1])


def test_markdown_is_rendered_and_a_block_appears_once() -> None:
    reply = "Some **bold** and `code`.\n\n1. one\n2. two\n\n```python\ndef f():\n    return 1\n```\n\nThe end"
    pieces = re.findall(r".{1,3}", reply, re.DOTALL)
    assert screen(*pieces) == screen(reply)
    shown = screen(*pieces)
    assert "Some bold and code." in shown and " 1 one\n 2 two" in shown and "     return 1" in shown
    assert "**" not in shown and "```" not in shown
    assert [shown.count(text) for text in ("bold", "two", "return", "The end")] == [1] * 4


def test_words_are_not_broken_at_the_margin() -> None:
    shown = screen("the quick br", "own fox jum", "ps over the lazy dog", width=20)
    assert shown == "the quick brown fox\njumps over the lazy\ndog\n"


def test_lines_stay_lines_and_signs_stay_signs() -> None:
    assert screen("2*3*4 = 24\n2**10 < vector<int>\n[here](http://x.y)") == (
        "2*3*4 = 24\n2**10 < vector<int>\nhere (http://x.y)\n"
    )


def test_tool_call_stands_between_the_text_on_a_terminal() -> None:
    shown = screen("Let me see: ", Delta("python", "37*45"), Delta("python_output", "1665"), "It is **1665**.")
    assert shown == "Let me see:\n[python] 37*45 -> 1665\nIt is 1665.\n"


def test_reply_longer_than_the_screen_is_shown_whole() -> None:
    shown = screen(*(f"paragraph {i}\n\n" for i in range(60)))
    assert shown.split("\n\n") == [*(f"paragraph {i}" for i in range(59)), "paragraph 59\n"]


def test_model_cannot_send_control_sequences_to_the_terminal() -> None:
    out = io.StringIO()
    writer = MarkdownPrinter(Console(file=out, width=40, force_terminal=True, color_system=None))
    writer.add(Delta("text", "a\x1b]0;title\x07b\x1b[2Jc"))
    writer.end()
    assert "\x1b]0" not in out.getvalue() and "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "\x1b" not in plain([Delta("text", "\x1b[31mred")])


def plain(deltas: Iterable[Delta]) -> str:
    out = io.StringIO()
    writer = PlainPrinter(out)
    for delta in deltas:
        writer.add(delta)
    writer.end()
    return out.getvalue()


@pytest.mark.parametrize(
    ("deltas", "written"),
    [
        ([("text", "hi")], "hi\n"),
        ([("text", "hi\n")], "hi\n"),
        ([], ""),
        ([("python", "1\n+1"), ("python_output", "2"), ("text", "two")], "[python] 1; +1 -> 2\ntwo\n"),
        (
            [("python", "1"), ("python_output", "1"), ("python", "2"), ("python_output", "2")],
            "[python] 1 -> 1\n[python] 2 -> 2\n",
        ),
        ([("text", "so "), ("python", "1+")], "so \n[python] 1+ -> (not run)\n"),
    ],
)
def test_plain_reply_has_one_line_a_tool_call(deltas: list[tuple[PartType, str]], written: str) -> None:
    assert plain(Delta(*delta) for delta in deltas) == written


def test_one_answer_goes_to_stdout_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    answer_once(ScriptedChatModel(), "calculate", SamplingParams())
    captured = capsys.readouterr()
    assert captured.out == "Let me see. \n[python] 37*45 -> 1665\nIt is 1665.\n"
    assert not captured.err


def test_one_answer_as_json_has_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    answer_once(ScriptedChatModel(), "calculate", SamplingParams(), as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "Let me see. It is 1665." and answer["finish_reason"] == "stop"
    assert {"type": "python_output", "text": "1665"} in answer["parts"]
    assert answer["completion_tokens"] > 10 and answer["tokens_per_second"] > 0
    assert answer["model"] == "sft d4 step 300"


def test_reader_that_leaves_a_pipe_sees_no_traceback() -> None:
    program = (
        "from nanochat.inference.sampling_params import SamplingParams\n"
        "from nanochat.serve.terminal import answer_once\n"
        "from tests.serve.scripted import ScriptedChatModel\n"
        "answer_once(ScriptedChatModel(pause=0.001), 'count to 100', SamplingParams(max_tokens=500))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_chat_without_a_terminal_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(UserError, match="-p"):
        keyboard(tmp_path / "history")
