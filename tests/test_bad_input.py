"""Bad files of the user's own end a command with one line and exit code 2, and change nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nanochat import cli, conversation_files, paths
from nanochat.data import demo_data, documents
from nanochat.tasks.mixtures import load_mixture
from scripts import identity_data, prepare

Reject = Callable[..., str]
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


@pytest.fixture
def reject(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> Reject:
    def reject(main: Callable[[Any], None], options: Any, *args: object) -> str:
        before = contents(base_dir)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(main, options, args=list(map(str, args)))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert contents(base_dir).items() >= before.items()
        return error

    return reject


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(**columns: Any) -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", r"no text in .*\.txt.*1 other"),
        ("a.jsonl", b'{"body": "x", "title": "y"}', r"no column text, only body, title.*--text-column"),
        ("a.jsonl", b'{"text": "' + b"x" * 5000 + b'"}', r"a\.jsonl must be JSON Lines, of at most 1.0 kB"),
        ("a.parquet", table(text=[{"en": "x"}], body=["x"]), r"holds struct.*not text; pass --text-column.*body"),
        ("a.parquet", table(text=[None, None]), "0 documents: at least 2"),
        ("a.parquet", b"PAR1", r"cannot read .*a\.parquet"),
        ("a.txt", b" " * 1_000_000, "0 documents: at least 2"),
    ],
)
def test_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reject: Reject, name: str, content: bytes, message: str
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    (tmp_path / "mine").mkdir()
    good = tmp_path / "mine" / "good.jsonl"
    good.write_text("".join(json.dumps({"text": text[:900]}) + "\n" for text in demo_data.documents("train")[:20]))
    args = ("--dataset", tmp_path / "mine", "--vocab-size", 400, "--no-tasks")
    cli.run(prepare.main, prepare.PrepareOptions, args=list(map(str, args)))
    good.unlink()
    (tmp_path / "mine" / name).write_bytes(content)
    assert re.search(message, reject(prepare.main, prepare.PrepareOptions, *args))


def test_text_with_bad_parts_is_used_without_them(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "blanks.txt").write_text("a" + " " * 1_000_000 + "b")
    (tmp_path / "mine" / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    lines = [b'{"text": "one"}', b"{broken", b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "two"}']
    (tmp_path / "mine" / "a.jsonl").write_bytes(b"\n".join(lines))
    options = prepare.PrepareOptions(dataset=(str(tmp_path / "mine"),), vocab_size=300, tasks=False)
    prepare.main(options)
    out = capsys.readouterr().out
    assert "29 empty documents" in out and "1 documents are not valid UTF-8" in out
    assert re.search(r"left out 2 lines .* the first is .*a\.jsonl:2", out)
    assert re.search(r"mine +4 +1 ", out)  # documents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [ANSWER, ASK]}, "message 1 is from the assistant"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "not 'narrator'"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "message 2 is empty"),
        ({"messages": [ASK, ANSWER], "more": "x" * 5000}, "longer than 1.0 kB"),
        (b'{"messages": [', "not JSON"),
        (b'{"prompt": "\xff", "completion": "x"}', "UTF-8"),
        ({"question": "x", "answer": "7", "grader": "python", "rule": "1 / 0"}, "grader, python, failed.*division"),
        ({"question": "x", "answer": "7", "grader": "number", "rule": "8"}, "rejects its own answer"),
        ({"question": "x", "answer": "7", "grader": "close enough"}, 'needs an answer, a "grader"'),
    ],
)
def test_conversations_and_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reject: Reject, line: dict[str, Any] | bytes, message: str
) -> None:
    monkeypatch.setattr(conversation_files, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "mine.jsonl"
    good = {"question": "2 + 2?", "answer": "4", "grader": "number"}
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    file.write_bytes(json.dumps(good).encode() + b"\n" + raw + b"\n")
    graded = "grader" in line if isinstance(line, dict) else False

    def train(_: object) -> None:
        load_mixture("rl" if graded else "sft", [str(file)], only=True)

    for error in (
        reject(train, identity_data.Options),
        reject(identity_data.main, identity_data.Options, "validate", "--file", file),
    ):
        assert re.search("line 2 of .*mine.jsonl is invalid|1 of 2 lines", error)
    assert re.search(message, reject(train, identity_data.Options))
    assert not paths.tokens_dir("sft").exists()
