import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from nanochat import cli, conversation_files
from nanochat.conversations import conversation
from nanochat.tokenizer import Tokenizer
from scripts import identity_data
from scripts.identity_data import LOST

ROWS = [
    conversation("Who built you?", "Ada [did] 🙂."),
    conversation("What is 1 + 1?", [{"type": "python", "text": "1 + 1"}, {"type": "python_output", "text": "2"}]),
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "identity_conversations.jsonl"
    conversation_files.append(path, ROWS)
    return path


def view(*args: str) -> int:
    """Run the program; its exit code."""
    try:
        cli.run(identity_data.main, identity_data.Options, demo=identity_data.DEMO, args=list(args))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_show_is_the_default_and_fits_80_columns(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation_files.append(file, [conversation("word " * 100, "answer " * 100)])
    assert view() == 0
    out = capsys.readouterr().out
    assert "Ada [did]" in out and "[python: 1 + 1]" in out and "line 2" in out
    assert max(map(len, out.splitlines())) <= 80


def test_show_limit(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("show", "--limit", "1") == 0
    out = capsys.readouterr().out
    assert "line 1" in out and "1 of 2 lines" in out and "line 2" not in out


def test_search_ignores_case_and_counts_matches(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("search", "ADA") == 0
    out = capsys.readouterr().out
    assert "line 1" in out and "line 2" not in out and "1 of 2 lines contain 'ADA'" in out
    assert view("search", "nobody") == 0
    assert "0 of 2 lines contain 'nobody'" in capsys.readouterr().out


def test_count(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("count") == 0
    assert "2 conversations" in capsys.readouterr().out


def test_validate(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("validate") == 0
    assert "all 2 lines are valid" in capsys.readouterr().out


def test_add(file: Path) -> None:
    assert view("add", "--user", "Hi!", "--assistant", "Hello!") == 0
    assert conversation_files.read(file) == [*ROWS, conversation("Hi!", "Hello!")]


def test_add_refuses_an_empty_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("add", "--user", "Hi!", "--assistant", "") == 2
    assert "message 2" in capsys.readouterr().err
    assert conversation_files.read(file) == ROWS


@pytest.mark.parametrize(
    "command", ["show", "search x", "count", "validate", "export --output {}/out.md", "add --user a --assistant b"]
)
def test_a_broken_line_is_reported_and_kept(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file.write_text(file.read_text() + "{oops\n")
    assert view(*command.format(tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert "line 3: it is not JSON" in captured.out
    assert "are invalid" in captured.err
    assert file.read_text().splitlines()[2] == "{oops"
    assert not (tmp_path / "out.md").exists()


def test_export(file: Path, tmp_path: Path) -> None:
    for suffix in ("json", "csv", "md"):
        assert view("export", "--output", str(tmp_path / f"out.{suffix}")) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == ROWS
    with (tmp_path / "out.csv").open(newline="") as table:
        turns = list(csv.DictReader(table))
    assert turns[1] == {"conversation": "1", "role": "assistant", "content": "Ada [did] 🙂."}
    assert len(turns) == 4
    assert "**user:** What is 1 + 1?" in (tmp_path / "out.md").read_text()


def test_export_rejects_existing_files_and_unknown_formats(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("mine")
    assert view("export", "--output", str(tmp_path / "out.csv")) == 2
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert view("export", "--output", str(tmp_path / "out.xls")) == 2
    assert view("export", "--output", str(tmp_path / "no" / "out.csv")) == 2


def test_file_and_demo_options(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "demo" / "identity_conversations.jsonl"
    conversation_files.append(other, ROWS[:1])
    assert view("count", "--file", str(other)) == 0
    assert "1 conversations" in capsys.readouterr().out
    assert view("--demo", "count") == 0
    assert "1 conversations" in capsys.readouterr().out


@pytest.fixture
def sharegpt(tmp_path: Path) -> Path:
    chats = [[{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello " * n}] for n in (1, 40)]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": chat} for chat in chats]))
    return tmp_path / "sharegpt.json"


def test_another_format_is_converted(file: Path, sharegpt: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert view("export", "--file", str(sharegpt), "--output", str(output)) == 0
    assert conversation_files.read(output) == [conversation("Hi!", "Hello " * n) for n in (1, 40)]
    assert view("validate", "--file", str(output)) == 0


def test_tokens_are_counted_and_shown_as_the_model_sees_them(
    file: Path,
    sharegpt: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert view("count", "--file", str(sharegpt)) == 0
    assert "run ./prepare.sh to count tokens" in capsys.readouterr().out
    tokenizer.save(file.parent / "tokenizer")
    assert view("count", "--file", str(sharegpt), "--context", "24") == 0
    lengths = [len(tokenizer.render_conversation(row).ids) for row in conversation_files.read(sharegpt)]
    out = " ".join(capsys.readouterr().out.split())
    assert f"{sum(lengths)} tokens" in out
    assert f"1 conversations are longer than the context of 24 tokens: {lengths[1] - 24} tokens" in out
    assert view("show", "--tokens", "--file", str(sharegpt), "--context", "24") == 0
    assert "<|assistant_start|>[Hello" in capsys.readouterr().out  # there are no colors here
    monkeypatch.setattr(identity_data, "console", Console(color_system="standard"))
    shown = identity_data.as_tokens(tokenizer.render_conversation(conversation_files.read(sharegpt)[1]), tokenizer, 24)
    spans = [(shown.plain[span.start : span.end], span.style) for span in shown.spans]
    assert [style for _, style in spans] == [
        identity_data.LEGEND[kind][0] for kind in ("only read", "trained on", LOST)
    ]
    assert spans[0][0] == "<|bos|><|user_start|>Hi!<|user_end|><|assistant_start|>"
    assert spans[1][0].startswith("Hello Hello") and spans[2][0].endswith("Hello <|assistant_end|>")


def test_graders_are_checked(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "a", "answer": "b", "grader": "number"}) + "\n")
    assert view("validate", "--file", str(tmp_path / "p.jsonl")) == 2
    assert "p.jsonl line 1: its grader, number" in capsys.readouterr().out


def test_nothing_is_added_to_a_json_array(file: Path, sharegpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sharegpt.read_bytes()
    assert view("add", "--user", "a", "--assistant", "b", "--file", str(sharegpt)) == 2
    assert "--file must end in .jsonl" in capsys.readouterr().err and sharegpt.read_bytes() == before


def test_a_missing_or_empty_file_is_named(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("nowhere", "nowhere.jsonl", "empty.jsonl"):
        assert view("validate", "--file", str(tmp_path / name)) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["add", "--user", "a", "--assistant", "b"]])
def test_a_missing_file_is_a_user_error(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert view(*args) == 2
    assert "run ./prepare.sh" in capsys.readouterr().err
