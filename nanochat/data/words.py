"""The words of the pretraining text, most frequent first: what spelling is practised on.

Words that people use rather than a dictionary's, and nothing more to download.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nanochat.errors import UserError

MOST_WORDS = 200_000
FEWEST_TIMES = 3
"""A word seen less often is as likely a misspelling."""
MOST_CHARS = 100_000_000
_WORD = re.compile(r"(?<![\w'-])[a-z]{3,15}(?![\w'-])")


def write_words(path: Path, texts: Iterable[str]) -> int:
    """Write the words of the first MOST_CHARS characters, one a line, unless `path` is there; how many it holds."""
    if not path.exists():
        counts: Counter[str] = Counter()
        left = MOST_CHARS
        for text in texts:
            counts.update(_WORD.findall(text))
            left -= len(text)
            if left <= 0:
                break
        words = [word for word, times in counts.most_common(MOST_WORDS) if times >= FEWEST_TIMES]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{word}\n" for word in words))
        partial.replace(path)
    return len(read_words(path))


def read_words(path: Path) -> list[str]:
    """What `write_words` wrote. Raises UserError if it did not."""
    try:
        words = path.read_text().split()
    except FileNotFoundError:
        words = []
    if not words:
        raise UserError(f"there are no words to spell in {path}: delete it and run ./prepare.sh")
    return words
