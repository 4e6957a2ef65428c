import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nanochat.data import documents
from nanochat.data.documents import Problems, find_parts, read, scan, sections
from nanochat.errors import UserError


def texts(*files: Path, columns: Sequence[str] = ("text",), problems: Problems | None = None) -> list[str]:
    parts = find_parts(files[0].parent, files, columns)
    return [text for part in parts for text in read(part, problems)]


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_every_format_plain_and_compressed(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": i, "text": f"line {i} é"}) + "\n" for i in range(3))
    table = parquet(tmp_path / "a.parquet", text=["one", "two", "three"])
    for name, content in (("a.txt", "plain é"), ("a.jsonl", lines), ("a.parquet", table.read_bytes())):
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(raw)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
        with pyarrow.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as out:
            out.write(raw)
    expected = {"txt": ["plain é"], "jsonl": [f"line {i} é" for i in range(3)], "parquet": ["one", "two", "three"]}
    for path in tmp_path.iterdir():
        assert texts(path) == expected[path.name.split(".")[1]], path


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 5000])
def test_parts_of_a_file_share_its_lines_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    monkeypatch.setattr(documents, "SMALL_FILE_BYTES", 0)
    expected = [f"document {i} " + "x" * (37 * i % 101) for i in range(40)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in expected))
    assert texts(file) == expected
    assert texts(parquet(tmp_path / "a.parquet", text=expected)) == expected


def test_parts_keep_their_names_when_files_are_added(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    few = {part.name: part for part in find_parts(tmp_path, sorted(tmp_path.iterdir()), [])}
    (tmp_path / "new.txt").write_text("new")
    many = {part.name: part for part in find_parts(tmp_path, sorted(tmp_path.iterdir()), [])}
    assert len(few.items() - many.items()) <= 1


def test_bad_lines_and_bytes_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    file, problems = tmp_path / "a.jsonl", Problems()
    lines = [b'{"text": "one"}', b"{broken", b"", b'{"text": null}', b'{"text": "\\ud83d half"}', b'{"text": "\xff"}']
    file.write_bytes(b"\n".join([*lines, b'{"text": 5}', b'{"other": 1}', b"[1]", b'{"text": "last"}']))
    assert texts(file, problems=problems) == ["one", "\ufffd half", "\ufffd", "last"]
    assert problems == Problems(1, 2, 4, f"{file}:2", str(file))


def test_encodings_of_plain_text(tmp_path: Path) -> None:
    for name, content in (
        ("latin.txt", "Gr\xfc\xdfe".encode("latin-1")),
        ("windows.txt", "Grüße\r\nzwei".encode("utf-16")),
        ("marked.txt", b"\xef\xbb\xbfa"),
    ):
        (tmp_path / name).write_bytes(content)
    problems = Problems()
    assert texts(tmp_path / "latin.txt", problems=problems) == ["Gr\ufffd\ufffde"]
    assert problems.invalid_utf8 == 1
    assert texts(tmp_path / "windows.txt") == ["Grüße\nzwei"]
    assert texts(tmp_path / "marked.txt") == ["a"]


def test_parquet_with_nulls_bytes_and_dictionaries(tmp_path: Path) -> None:
    problems = Problems()
    assert texts(parquet(tmp_path / "a.parquet", text=["x", None, "y"]), problems=problems) == ["x", "y"]
    assert problems.empty == 1
    assert texts(parquet(tmp_path / "b.parquet", text=[b"\xff ok", b"z"])) == ["\ufffd ok", "z"]
    assert texts(parquet(tmp_path / "c.parquet", text=pyarrow.array(["x", "x"]).dictionary_encode())) == ["x", "x"]


def test_the_column_is_the_first_that_a_file_has(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"meta": 1}\n{"meta": 1, "body": "b", "title": "t"}')
    assert texts(file, columns=["text", "body", "title"]) == ["b"]
    with pytest.raises(UserError, match=r"a\.jsonl has no column text.*--text-column.*body, title"):
        texts(file)
    table = parquet(tmp_path / "a.parquet", id=[1], nested=[{"text": "x"}], body=["b"])
    assert texts(table, columns=["text", "body"]) == ["b"]
    with pytest.raises(UserError, match=r"a\.parquet has no column text, only id, nested, body.*--text-column"):
        texts(table)
    with pytest.raises(UserError, match=r"column nested .*holds struct<text: string>.*body"):
        texts(table, columns=["nested"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-12])
    (tmp_path / "c.txt.zst").write_bytes(b"not zstd")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            texts(path)


def test_long_documents_become_sections_at_the_ends_of_paragraphs(tmp_path: Path) -> None:
    paragraph = "word " * 2000 + "\n\n"
    text = paragraph * 20 + "x" * 100_000
    cut = list(sections([text[:50_000], text[50_000:]]))
    assert "".join(cut) == text and max(map(len, cut)) <= documents.SECTION_CHARS
    assert cut[0] == paragraph * 3
    longer = list(sections([text + " appended"]))
    assert longer[: len(cut) - 1] == cut[:-1]
    (tmp_path / "blank.txt").write_text("a" + " " * 1_000_000 + "b")
    found = scan(find_parts(tmp_path, [tmp_path / "blank.txt"], [])[0])
    assert len(found.digests) == 2 and found.problems.empty > 28


def test_a_line_nested_too_deeply_is_unreadable(tmp_path: Path) -> None:
    file, problems = tmp_path / "a.jsonl", Problems()
    file.write_text("[" * 100_000 + '\n{"text": "kept"}\n')
    assert texts(file, problems=problems) == ["kept"]
    assert problems.unreadable == 1
