"""Questions about the things and people that the embedded encyclopedia's train articles open with."""

import random
import re

from nanochat.conversations import Conversation, conversation
from nanochat.data import embedded
from nanochat.tasks.task import Task

THING_QUESTIONS = (
    "What is {}?", "What is {}?", "Tell me about {}.", "What do you know about {}?", "Can you explain what {} is?",
    "Please describe {}.", "Do you know what {} is?", "I would like to learn about {}.", "what is {}", "Explain {}.",
)  # fmt: skip
PERSON_QUESTIONS = (
    "Who {} {}?", "Who {} {}?", "Tell me about {1}.", "What do you know about {1}?", "Do you know who {1} {0}?",
    "Can you tell me who {1} {0}?", "Tell me who {1} {0}.", "who {} {}", "I would like to learn about {1}.",
)  # fmt: skip
MAX_CHARACTERS = 300

# A sentence ends at . ! or ? before a capital, but not after an initial or an abbreviation, as in "St. Paul".
_ABBREVIATIONS = ("St", "Dr", "Mr", "Mrs", "Jr", "Sr", "Mt", "Ft", "No", "c", "ca", "fl", "lit", "vs", "approx")
_SENTENCE_END = re.compile(
    r"[.!?](?<!\b[A-Z]\.)" + "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS) + r"[\"')]?\s+(?=[\"'(]?[A-Z0-9])"
)
_ARTICLE = re.compile(r"\b(?:an?|the) ", re.IGNORECASE)


class Encyclopedia(Task):
    """What an article says first, asked for by its title; every article `repeats` times, worded anew.

    The articles held out of pretraining are not asked for.
    """

    name = "encyclopedia"

    def __init__(self, repeats: int = 1) -> None:
        self._rows = []
        for article in embedded.articles("train"):
            summary = first_sentences(article.extract)
            if len(summary) <= MAX_CHARACTERS:
                self._rows.append((article.title, article.topic == "People", summary))
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._rows) * self._repeats

    def row(self, index: int) -> Conversation:
        title, person, summary = self._rows[index % len(self._rows)]
        rng = random.Random(f"{self.name} {index}")
        if person:
            verb = "is" if " is " in summary.partition(" was ")[0] else "was"
            return conversation(rng.choice(PERSON_QUESTIONS).format(verb, title), summary)
        return conversation(rng.choice(THING_QUESTIONS).format(_in_a_sentence(title, summary)), summary)


def first_sentences(text: str) -> str:
    """The first sentence of an article, and the second where both fit MAX_CHARACTERS."""
    sentences = _split(text.split("\n")[0])
    both = " ".join(sentences[:2])
    return both if len(both) <= MAX_CHARACTERS else sentences[0]


def _split(paragraph: str) -> list[str]:
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph)]
    return [paragraph[start:end].strip() for start, end in zip([0, *ends], [*ends, len(paragraph)], strict=True)]


def _in_a_sentence(title: str, summary: str) -> str:
    """The title as one writes it in mid-sentence, with its own article: "Hat" gives "a hat"."""
    title = re.sub(r" \(.*\)$", "", title)
    for article in _ARTICLE.finditer(summary):
        following = summary[article.end() :]
        if following[: len(title)].lower() == title.lower() and not following[len(title) :][:1].isalnum():
            return article[0].lower() + following[: len(title)]
    return title
