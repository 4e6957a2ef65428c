"""Spelling words and counting their letters: what a model that reads tokens, not letters, finds hard."""

import random
from collections.abc import Sequence

from nanochat.conversations import Conversation, conversation
from nanochat.data.splits import held_out
from nanochat.tasks.task import GradedTask, NumberTask, Reply, Split, final_text

TEST_SHARE = 0.1
SPELLING_QUESTIONS = (
    "Spell the word '{}'.", "Spell '{}'.", "How do you spell '{}'?", "Please spell '{}'.", "How is '{}' spelled?",
    "Can you spell '{}'?", "Can you spell the word '{}' for me?", "Write '{}' letter by letter.",
    "What are the letters of '{}'?", "Spell {}.", "How do you spell {}?", "spell {}",
)  # fmt: skip
COUNT_QUESTIONS = (
    "How many '{letter}' are in '{word}'?", "How many {letter}'s are in '{word}'?", "Count the {letter}'s in '{word}'.",
    "How many times does '{letter}' appear in '{word}'?", "Count the letter '{letter}' in '{word}'.",
    "How often is the letter '{letter}' in '{word}'?", "How many {letter} are in {word}?",
    "How many times does the letter {letter} occur in {word}?", "How many {letter}'s are in the word {word}?",
)  # fmt: skip


class Spelling(GradedTask):
    """A word and its letters, joined by hyphens, which a BPE tokenizer leaves apart: 'apple' is a-p-p-l-e."""

    name = "spelling"

    def __init__(self, words: Sequence[str], split: Split, repeats: int = 1) -> None:
        self._words = _words_of(words, split)
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._words) * self._repeats

    def row(self, index: int) -> Conversation:
        word = self._words[index % len(self._words)]
        rng = random.Random(f"{self.name} {index}")
        return conversation(rng.choice(SPELLING_QUESTIONS).format(word), "-".join(word))

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply is the word's letters joined by hyphens, whatever stands around it, else 0.0."""
        expected = final_text(conversation["messages"][-1]["content"])
        words = (word.strip(".,:;!?\"'") for word in final_text(reply).split())
        return float([word for word in words if "-" in word or word == expected] == [expected])


class LetterCount(NumberTask):
    """How often a letter is in a word, counted with the python tool."""

    name = "letter count"

    def __init__(self, words: Sequence[str], split: Split, repeats: int = 1) -> None:
        self._words = _words_of(words, split)
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._words) * self._repeats

    def row(self, index: int) -> Conversation:
        word = self._words[index % len(self._words)]
        rng = random.Random(f"{self.name} {index}")
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        count = word.count(letter)
        return conversation(
            rng.choice(COUNT_QUESTIONS).format(letter=letter, word=word),
            [
                # In brackets the quoted word has the tokens that it has in the question, and so can be copied.
                {"type": "python", "text": f"('{word}').count('{letter}')"},
                {"type": "python_output", "text": str(count)},
                {
                    "type": "text",
                    "text": f"The letter '{letter}' appears {count} time{'s' * (count != 1)} in '{word}'.",
                },
            ],
        )


def _words_of(words: Sequence[str], split: Split) -> list[str]:
    return [word for word in words if held_out(word, TEST_SHARE) == (split == "test")]
