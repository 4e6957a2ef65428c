"""Compare the tokenizer's compression with GPT-2's and GPT-4's.

python -m scripts.tok_eval
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""name to print: name in tiktoken, which downloads 1 to 2 MB for each from OpenAI"""

Encode = Callable[[str], Sequence[int]]


@dataclass
class TokEvalOptions:
    """Compare bytes per token by kind of text."""

    text: Path | None = None
    """your own text file, to add to the comparison"""


def main(options: TokEvalOptions) -> None:
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    texts = load_texts()
    if options.text:
        try:
            texts[options.text.name] = options.text.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--text must be a UTF-8 text file, cannot read {options.text} ({error})") from None
        if not texts[options.text.name]:
            raise UserError(f"--text must be a file with text in it, {options.text} is empty")
    tokenizers: dict[str, Encode] = {f"ours ({tokenizer.vocab_size:,})": tokenizer.encode}
    console = Console(highlight=False)
    for name, encoding in REFERENCES.items():
        try:
            tokenizers[name] = tiktoken.get_encoding(encoding).encode_ordinary
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong digest is a ValueError
            console.print(f"{name} is not shown: its download failed ({type(error).__name__})")
    table = Table(title="Bytes per token (higher is better)")
    for heading in ("text", "bytes", *tokenizers):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for kind, text in texts.items():
        ratios = (f"{bytes_per_token(encode, text):.2f}" for encode in tokenizers.values())
        table.add_row(kind, f"{len(text.encode()):,}", *ratios)
    console.print(table)


def load_texts() -> dict[str, str]:
    """Sample texts by kind (prose, code, ...), written for this comparison: no tokenizer was trained on them."""
    lines = Path(__file__).with_name("tok_eval_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["kind"]: row["text"] for row in map(json.loads, lines)}


def bytes_per_token(encode: Encode, text: str) -> float:
    return len(text.encode()) / len(encode(text))


if __name__ == "__main__":
    cli.run(main, TokEvalOptions, demo=TokEvalOptions())
