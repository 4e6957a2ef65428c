"""Read documents from text, JSON Lines and Parquet files, plain or compressed.

Files are read in parts, so that several processes share large files and only changed parts are tokenized again. Long
documents are cut into sections: this bounds memory, and even a single book has something to hold out.
"""

import codecs
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from nanochat.data.split import digest64
from nanochat.errors import UserError
from nanochat.units import format_bytes
from nanochat.untrusted import MAX_LINE_BYTES, reading, skip_line

REPLACE = "replace the file, or if it was downloaded, run ./prepare.sh --verify"
FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "null")
SECTION_CHARS = 1 << 15  # about 8,000 tokens, four rows of the default context
PART_BYTES = 32 << 20
SMALL_FILE_BYTES, SMALL_FILE_PARTS = 1 << 20, 64
"""Smaller files are collected in this many parts, by a hash of their name."""
LINES_WITH_ALL_FIELDS = 100  # a field that none of the first lines has is missing


class Span(NamedTuple):
    """A range of one file: bytes of JSON Lines, row groups of Parquet, otherwise the whole file."""

    path: Path
    column: str = "text"
    start: int = 0
    stop: int | None = None  # None: end of the file


class Part(NamedTuple):
    """Some documents, read by one process. Pickled on its way there."""

    name: str  # does not change when other files are added
    spans: tuple[Span, ...]


@dataclass
class Problems:
    """Numbers of documents that were left out or altered."""

    empty: int = 0
    invalid_utf8: int = 0  # with U+FFFD in place of the invalid bytes
    unreadable: int = 0  # lines that are not JSON objects with a text
    first_unreadable: str = ""  # file:line
    first_invalid: str = ""  # file


class Scan(NamedTuple):
    """Facts about the documents of a part, in order."""

    digests: np.ndarray  # (N,) uint64
    characters: int
    problems: Problems


def text_format(path: Path) -> str:
    """The format of a file, such as .jsonl for a.jsonl.gz."""
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def find_parts(root: Path, files: Sequence[Path], columns: Sequence[str]) -> list[Part]:
    """Divide files below `root` into parts. Parquet and JSON Lines need one of `columns`, else raises UserError."""
    parts, small = [], dict[str, list[Span]]()
    for path in files:
        name = digest64(str(path.relative_to(root)))
        with reading(path, REPLACE):
            spans = list(_spans(path, columns))
        if path.stat().st_size < SMALL_FILE_BYTES:
            small.setdefault(f"small-{name % SMALL_FILE_PARTS:02d}", []).extend(spans)
        else:
            parts += [Part(f"{name:016x}-{number}", (span,)) for number, span in enumerate(spans)]
    return parts + [Part(name, tuple(small[name])) for name in sorted(small)]


def _spans(path: Path, columns: Sequence[str]) -> Iterator[Span]:
    """Cut a file into spans of about PART_BYTES, if its format allows that."""
    if text_format(path) == ".parquet":
        with _parquet(path) as file:
            column = _choose_column(path, {field.name: _kind(field.type) for field in file.schema_arrow}, columns)
            start, size = 0, 0
            for group in range(file.num_row_groups):
                size += file.metadata.row_group(group).total_byte_size
                if size >= PART_BYTES or group == file.num_row_groups - 1:
                    yield Span(path, column, start, group + 1)
                    start, size = group + 1, 0
    elif text_format(path) == ".jsonl":
        fields: dict[str, str] = {}
        for _, line in islice(_lines(Span(path)), LINES_WITH_ALL_FIELDS):
            with suppress(ValueError, TypeError, RecursionError):
                record = dict(_parse(line))
                fields |= {name: type(value).__name__ for name, value in record.items() if value is not None}
        column = _choose_column(path, fields, columns)
        if path.suffix in COMPRESSIONS:
            yield Span(path, column)
            return
        for start in range(0, path.stat().st_size, PART_BYTES):
            yield Span(path, column, start, start + PART_BYTES)
    else:
        yield Span(path)


def _choose_column(path: Path, kinds: dict[str, str], columns: Sequence[str]) -> str:
    """The first of `columns` that a file has. `kinds`: type of each of its columns."""
    if not kinds:
        raise UserError(f"{path} must be JSON Lines, of at most {format_bytes(MAX_LINE_BYTES)} each: convert it")
    textual = [name for name, kind in kinds.items() if kind in ("str", *TEXT_TYPES)]
    choice = f"pass --text-column with one of: {', '.join(textual)}" if textual else "no column has text"
    for column in columns:
        if column in textual:
            return column
        if column in kinds:
            raise UserError(f"column {column} of {path} holds {kinds[column]}, not text; {choice}")
    raise UserError(f"{path} has no column {' or '.join(columns)}, only {', '.join(kinds)}; {choice}")


def read(part: Part, problems: Problems | None = None) -> Iterator[str]:
    """Yield the documents that are not empty, long ones in sections. Raises UserError for a damaged file."""
    problems = problems or Problems()
    readers = {".parquet": _parquet_documents, ".jsonl": _json_documents}
    for span in part.spans:
        with reading(span.path, REPLACE):
            for document in readers.get(text_format(span.path), _plain_documents)(span, problems):
                for text in sections(document):
                    try:
                        text.encode()
                    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
                        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                    if "\ufffd" in text:
                        problems.invalid_utf8 += 1
                        problems.first_invalid = problems.first_invalid or str(span.path)
                    if text.strip():
                        yield text
                    else:
                        problems.empty += 1


def read_chosen(part: Part, chosen: np.ndarray) -> Iterator[str]:
    """Yield the documents for which `chosen`, (N,) bool, is true."""
    return compress(read(part), chosen)


def scan(part: Part) -> Scan:
    """Read a part once to find out what is in it."""
    problems, digests, characters = Problems(), [], 0
    for text in read(part, problems):
        digests.append(digest64(text))
        characters += len(text)
    return Scan(np.array(digests, np.uint64), characters, problems)


def _open(path: Path) -> BinaryIO:
    if path.suffix not in COMPRESSIONS:
        return open(path, "rb", buffering=1 << 20)
    stream: Any = pyarrow.input_stream(str(path), compression=COMPRESSIONS[path.suffix])
    return io.BufferedReader(stream, 1 << 20)


def _plain_documents(span: Span, problems: Problems) -> Iterator[Iterable[str]]:
    with _open(span.path) as file:
        start = file.peek(2)[:2]  # type: ignore[attr-defined]  # BufferedReader
        encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        text = io.TextIOWrapper(file, encoding, errors="replace")
        yield iter(lambda: text.read(1 << 20), "")


def _json_documents(span: Span, problems: Problems) -> Iterator[Iterable[str]]:
    for position, line in _lines(span):
        if line.isspace():
            continue
        try:
            text = _parse(line)[span.column]
            if not isinstance(text, str | None):
                raise TypeError
            yield [text or ""]
        except (ValueError, KeyError, TypeError, RecursionError):
            problems.unreadable += 1
            if not problems.first_unreadable:
                number = 1 + sum(1 for _ in _lines(Span(span.path, stop=position)))
                problems.first_unreadable = f"{span.path}:{number}"


def _parse(line: bytes) -> Any:
    """Parse JSON in UTF-8, with U+FFFD for invalid bytes."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return json.loads(line.decode("utf-8", "replace"))


def _lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """Yield position and content of the lines that start in the span, at most MAX_LINE_BYTES of each."""
    with _open(span.path) as file:
        position = 0
        if span.start:
            position = file.seek(span.start - 1)
            position += skip_line(file, (span.stop or sys.maxsize) - position)
        while (span.stop is None or position < span.stop) and (line := file.readline(MAX_LINE_BYTES)):
            yield position, line
            position += len(line)
            if not line.endswith(b"\n"):
                position += skip_line(file)


def _kind(kind: pyarrow.DataType) -> str:
    return str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)


def _parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file; a compressed one, which nobody needs to make, is read into memory."""
    source = pyarrow.BufferReader(_open(path).read()) if path.suffix in COMPRESSIONS else path
    return pyarrow.parquet.ParquetFile(source)


def _parquet_documents(span: Span, problems: Problems) -> Iterator[Iterable[str]]:
    with _parquet(span.path) as file:
        groups = range(span.start, span.stop or file.num_row_groups)
        for batch in file.iter_batches(1024, groups, [span.column], use_threads=False):
            array = batch.column(0)
            array = array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array
            for text in array.cast(pyarrow.large_binary()).to_pylist():
                yield [(text or b"").decode("utf-8", "replace")]


def sections(pieces: Iterable[str]) -> Iterator[str]:
    """Cut a document, given in pieces, after the last paragraph, line or word before each SECTION_CHARS characters."""
    rest = ""
    for piece in pieces:
        rest, start = rest + piece, 0
        while len(rest) - start > SECTION_CHARS:
            middle, end = start + SECTION_CHARS // 2, start + SECTION_CHARS
            cuts = (rest.rfind(mark, middle, end) + len(mark) for mark in ("\n\n", "\n", " "))
            cut = next((cut for cut in cuts if cut > middle), end)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    yield rest
