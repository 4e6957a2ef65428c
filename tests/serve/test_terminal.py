"""The terminal chat: what it writes, what its commands do, and how it takes an interruption."""

import io
import os
import re
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
from nanochat.serve.markdown import MarkdownWriter
from nanochat.serve.terminal import TerminalChat, answer_once, keyboard
from nanochat.serve.writers import PlainWriter
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


def screen(*deltas: str | Delta, width: int = 40) -> str:
    """What stands on a terminal after a reply of these pieces, without colours."""
    out = io.StringIO()
    writer = MarkdownWriter(Console(file=out, width=width, force_terminal=True, color_system=None))
    for delta in deltas:
        writer.add(Delta("text", delta) if isinstance(delta, str) else delta)
    writer.end()
    return after_erasing(out.getvalue())


def after_erasing(written: str) -> str:
    """Follows the cursor: to draw lines anew rich goes up and erases them (ESC [1A, ESC [2K)."""
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
    writer = MarkdownWriter(Console(file=out, width=40, force_terminal=True, color_system=None))
    writer.add(Delta("text", "a\x1b]0;title\x07b\x1b[2Jc"))
    writer.end()
    assert "\x1b]0" not in out.getvalue() and "\x1b[2J" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "\x1b" not in plain([Delta("text", "\x1b[31mred")])


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
