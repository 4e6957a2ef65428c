"""Bytes of text per token, by kind of text, for several tokenizers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tiktoken
from rich.table import Table

Encode = Callable[[str], Sequence[int]]

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""name to print: name in tiktoken"""

TEXTS = Path(__file__).with_name("compression_texts.jsonl")
"""Written for this comparison, so that no tokenizer was trained on them."""


def load_texts() -> dict[str, str]:
    """Sample texts by kind: prose, code, numbers, other scripts."""
    rows = map(json.loads, TEXTS.read_text(encoding="utf-8").splitlines())
    return {row["kind"]: row["text"] for row in rows}


def load_references() -> tuple[dict[str, Encode], str]:
    """The reference tokenizers that tiktoken can load, and a message about the others, empty if there are none.

    tiktoken downloads each one once from OpenAI, one or two megabytes.
    """
    loaded: dict[str, Encode] = {}
    missing = []
    for name, encoding in REFERENCES.items():
        try:
            loaded[name] = tiktoken.get_encoding(encoding).encode_ordinary
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong digest is a ValueError
            missing.append(f"{name} ({type(error).__name__})")
    if not missing:
        return loaded, ""
    return loaded, f"not shown: {' and '.join(missing)}; the download failed"


def bytes_per_token(encode: Encode, text: str) -> float:
    """UTF-8 bytes per token of `text`."""
    return len(text.encode()) / len(encode(text))


def compression_table(tokenizers: Mapping[str, Encode], texts: Mapping[str, str]) -> Table:
    """One row per kind of text, one column per tokenizer; fits in 80 columns."""
    table = Table(title="Bytes per token (more is better)")
    table.add_column("text")
    table.add_column("bytes", justify="right")
    for name in tokenizers:
        table.add_column(name, justify="right")
    for kind, text in texts.items():
        cells = (f"{bytes_per_token(encode, text):.2f}" for encode in tokenizers.values())
        table.add_row(kind, f"{len(text.encode()):,}", *cells)
    return table
