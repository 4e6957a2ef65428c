"""Spelling words and counting their letters, which is hard for a model that reads tokens instead of letters.

The words are the most frequent ones of the pretraining text.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanochat import paths
from nanochat.atomic import atomic_write
from nanochat.conversations import Conversation, conversation
from nanochat.data import demo_data
from nanochat.data.split import held_out
from nanochat.errors import UserError
from nanochat.tasks.task import GradedTask, NumberTask, Reply, Split, final_text, load_wording

TEST_SHARE = 0.1
DEMO_WORDS = 3000  # the demo spells this many words
MAX_WORDS = 200_000
MIN_OCCURRENCES = 3  # rarer words are often misspellings
_WORD = re.compile(r"(?<![\w'-])[a-z]{3,15}(?![\w'-])")


class WordTask(GradedTask):
    """One row per word of the split, `repeats` times, each time worded differently."""

    questions = load_wording("spelling")

    def __init__(self, words: Sequence[str], split: Split, repeats: int = 1) -> None:
        self._words = [word for word in words if held_out(word, TEST_SHARE) == (split == "test")]
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._words) * self._repeats

    def _draw(self, index: int) -> tuple[str, random.Random]:
        return self._words[index % len(self._words)], random.Random(f"{self.name} {index}")


class Spelling(WordTask):
    """A word and its letters, joined by hyphens, which a BPE tokenizer does not merge: 'apple' is a-p-p-l-e."""

    name = "spelling"

    def __getitem__(self, index: int) -> Conversation:
        word, rng = self._draw(index)
        return conversation(rng.choice(self.questions["spell"]).format(word), "-".join(word))

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the word's letters joined by hyphens are the only hyphenated word in the reply, else 0.0."""
        expected = conversation["messages"][-1]["content"]
        words = (word.strip(".,:;!?\"'") for word in final_text(reply).split())
        return float([word for word in words if "-" in word or word == expected] == [expected])


class LetterCount(WordTask, NumberTask):
    """How often a letter occurs in a word, counted with the python tool."""

    name = "letter count"

    def __getitem__(self, index: int) -> Conversation:
        word, rng = self._draw(index)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        count = word.count(letter)
        times = f"{count} time{'s' * (count != 1)}"
        return conversation(
            rng.choice(self.questions["count"]).format(letter=letter, word=word),
            [
                # In parentheses, the quoted word has the same tokens as in the question, so it can be copied.
                {"type": "python", "text": f"('{word}').count('{letter}')"},
                {"type": "python_output", "text": str(count)},
                {"type": "text", "text": f"The letter '{letter}' appears {times} in '{word}'."},
            ],
        )


def spelling_words() -> list[str]:
    """Return the words that prepare.sh listed, or the most frequent ones of the demo's encyclopedia."""
    file = paths.words_file()
    return read_words(file) if file.exists() else demo_data.frequent_words(DEMO_WORDS)


def write_words(path: Path, texts: Iterable[str]) -> int:
    """Write the frequent words of `texts` to `path`, unless it exists. Return their number."""
    if not path.exists():
        counts = Counter(word for text in texts for word in _WORD.findall(text))
        with atomic_write(path) as file:
            file.writelines(f"{word}\n" for word, n in counts.most_common(MAX_WORDS) if n >= MIN_OCCURRENCES)
    return len(read_words(path))


def read_words(path: Path) -> list[str]:
    """Read the file of `write_words`. Raises UserError if it is missing or empty."""
    words = path.read_text().split() if path.exists() else []
    if not words:
        raise UserError(f"{path} has no words for the spelling tasks: delete it and run ./prepare.sh")
    return words
