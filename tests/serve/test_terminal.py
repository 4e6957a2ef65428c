"""The terminal chat: what it writes, what its commands do, and how it takes an interruption."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from nanochat.data.conversations import PartType
from nanochat.errors import UserError
from nanochat.inference.reply import Delta
from nanochat.inference.sampling import Sampling
from nanochat.serve.terminal import TerminalChat, answer_once, keyboard
from nanochat.serve.writers import PlainWriter, ScreenWriter
from tests.serve.scripted import ScriptedChatModel


def talk(typed: Iterable[str | BaseException], model: ScriptedChatModel | None = None) -> tuple[str, TerminalChat]:
    """What a terminal of 40 columns shows after a person typed these lines and left."""
    lines = iter(typed)

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    chat = TerminalChat(model or ScriptedChatModel(), Sampling(), read, Console(file=out, width=40))
    chat.run()
    return out.getvalue(), chat


def test_first_line_says_which_model_talks() -> None:
    assert talk([])[0].startswith("sft d4 step 300. ")


def test_conversation_goes_on_with_what_was_said() -> None:
    model = ScriptedChatModel()
    talk(["hello", "calculate", "bye"], model)
    messages, _ = model.seen[-1]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[1]["content"] == [{"type": "text", "text": "hello "}]
    assert {"type": "python_output", "text": "1665"} in messages[3]["content"]


def test_tool_call_stands_on_a_line_of_its_own() -> None:
    shown, _ = talk(["calculate"])
    assert "Let me work it out. \n[python] 37*45 -> 1665\nIt is 1665.\n" in shown


def test_commands_set_what_the_next_reply_uses() -> None:
    model = ScriptedChatModel()
    talk(["/temperature 0.3", "/topk 5", "/system be brief", "hello", "/topk 0", "/clear", "hi"], model)
    (first, sampling), (second, later) = model.seen
    assert (sampling.temperature, sampling.top_k) == (0.3, 5)
    assert first == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert later.top_k is None
    assert second == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/dance", "There is no command /dance"),
        ("/temperature hot", "/temperature takes a number from 0 to 2"),
        ("/temperature nan", "/temperature takes a number"),
        ("/temperature 3", "/temperature takes a number"),
        ("/topk 1.5", "/topk takes a whole number"),
        ("/topk", "it is 50"),
        ("/help", "/system TEXT"),
        (KeyboardInterrupt(), "Ctrl-D or /exit leaves."),
        ("refuse", "this cannot be answered"),
    ],
)
def test_mistake_gets_a_sentence_and_the_chat_goes_on(typed: str | BaseException, told: str) -> None:
    model = ScriptedChatModel()
    shown, _ = talk([typed, "hello"], model)
    assert told in " ".join(shown.split())
    assert model.seen[-1][0] == [{"role": "user", "content": "hello"}]


def test_exit_leaves_at_once() -> None:
    model = ScriptedChatModel()
    talk(["/exit", "hello"], model)
    assert not model.seen


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    class Interrupted(ScriptedChatModel):
        def _script(self, text, stop):  # type: ignore[no-untyped-def]  # as in the class it extends
            for delta in super()._script(text, stop):
                yield delta
                if text == "wait":
                    os.kill(os.getpid(), signal.SIGINT)

    model = Interrupted()
    before = signal.getsignal(signal.SIGINT)
    shown, chat = talk(["wait", "hello"], model)
    assert "well\n(stopped)" in shown and "hello" in shown
    assert chat.messages[1]["content"] == [{"type": "text", "text": "well"}]
    assert signal.getsignal(signal.SIGINT) is before


def screen(*texts: str, width: int = 20) -> str:
    out = io.StringIO()
    writer = ScreenWriter(Console(file=out, width=width))
    for text in texts:
        writer.add(Delta("text", text))
    writer.end()
    return out.getvalue()


def test_words_are_not_broken_at_the_margin() -> None:
    shown = screen("the quick br", "own fox jum", "ps over the lazy dog")
    assert [line.rstrip() for line in shown.splitlines()] == ["the quick brown fox", "jumps over the lazy", "dog"]


def test_word_that_fills_the_line_leaves_no_empty_one() -> None:
    assert screen("a" * 20 + " bc") == "a" * 20 + "\nbc\n"
    assert screen("a" * 50 + " bc") == "a" * 50 + " bc\n"


def test_indentation_and_empty_lines_stay() -> None:
    assert screen("def f():\n", "    return 1\n\nend\n") == "def f():\n    return 1\n\nend\n"


def test_model_cannot_send_control_sequences_to_the_terminal() -> None:
    assert "\x1b" not in screen("a\x1b]0;title\x07b\x1b[2Jc") + plain([Delta("text", "\x1b[31mred")])


def plain(deltas: Iterable[Delta]) -> str:
    out = io.StringIO()
    writer = PlainWriter(out)
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
    answer_once(ScriptedChatModel(), "calculate", Sampling())
    captured = capsys.readouterr()
    assert captured.out == "Let me work it out. \n[python] 37*45 -> 1665\nIt is 1665.\n"
    assert not captured.err


def test_reader_that_leaves_a_pipe_sees_no_traceback() -> None:
    program = (
        "from nanochat.inference.sampling import Sampling\n"
        "from nanochat.serve.terminal import answer_once\n"
        "from tests.serve.scripted import ScriptedChatModel\n"
        "answer_once(ScriptedChatModel(0.001), 'count to 100', Sampling())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_chat_without_a_terminal_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(UserError, match="pass -p TEXT"):
        keyboard(tmp_path / "history")
