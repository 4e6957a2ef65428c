"""Bytes of text per token, by kind of text, for several tokenizers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tiktoken
from rich.table import Table

Encode = Callable[[str], Sequence[int]]

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""name to print: name in tiktoken"""


def load_texts() -> dict[str, str]:
    """Sample texts by kind (prose, code, ...), written for this comparison: no tokenizer was trained on them."""
    lines = Path(__file__).with_name("compression_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["kind"]: row["text"] for row in map(json.loads, lines)}


def load_references() -> tuple[dict[str, Encode], list[str]]:
    """Load the reference tokenizers, 1 to 2 MB each from OpenAI. Returns them and the errors of the others."""
    loaded: dict[str, Encode] = {}
    errors = []
    for name, encoding in REFERENCES.items():
        try:
            loaded[name] = tiktoken.get_encoding(encoding).encode_ordinary
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong digest is a ValueError
            errors.append(f"{name} is not shown, its download failed ({type(error).__name__})")
    return loaded, errors


def bytes_per_token(encode: Encode, text: str) -> float:
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
