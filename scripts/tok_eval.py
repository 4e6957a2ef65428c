"""Compare the tokenizer's compression with GPT-2's and GPT-4's.

python -m scripts.tok_eval
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.eval.compression import compression_table, load_references, load_texts
from nanochat.tokenizer import Tokenizer


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
    references, problems = load_references()
    console = Console(highlight=False)
    ours = {f"ours ({tokenizer.vocab_size:,})": tokenizer.encode}
    console.print(compression_table(ours | references, texts))
    for problem in problems:
        console.print(problem)


if __name__ == "__main__":
    cli.run(main, TokEvalOptions, demo=TokEvalOptions())
