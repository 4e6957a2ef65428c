"""Questions about the demo's encyclopedia, with free or multiple-choice answers. Train articles only."""

import random
import re

from nanochat.conversations import Conversation, conversation
from nanochat.data import demo_data
from nanochat.tasks.multiple_choice import Choices, multiple_choice
from nanochat.tasks.task import ConversationList, load_wording

MAX_ANSWER_CHARS = 300
MAX_CHOICE_CHARS = 40

# A sentence ends at . ! or ? before a capital, but not after an initial or an abbreviation, as in "St. Paul".
_ABBREVIATIONS = ("St", "Dr", "Mr", "Mrs", "Jr", "Sr", "Mt", "Ft", "No", "c", "ca", "fl", "lit", "vs", "approx")
_SENTENCE_END = re.compile(
    r"[.!?](?<!\b[A-Z]\.)" + "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS) + r"[\"')]?\s+(?=[\"'(]?[A-Z0-9])"
)
_ARTICLE = re.compile(r"\b(?:an?|the) ", re.IGNORECASE)


class Encyclopedia(ConversationList):
    """The first sentences of an article as the answer to a question about its title."""

    def __init__(self) -> None:
        questions = load_wording("encyclopedia")
        rows: list[Conversation] = []
        for article in demo_data.articles("train"):
            summary = first_sentences(article.extract)
            if len(summary) > MAX_ANSWER_CHARS:
                continue
            rng = random.Random(f"encyclopedia {len(rows)}")
            if article.topic == "People":
                verb = "is" if " is " in summary.partition(" was ")[0] else "was"
                question = rng.choice(questions["person"]).format(verb, article.title)
            else:
                question = rng.choice(questions["thing"]).format(_with_article(article.title, summary))
            rows.append(conversation(question, summary))
        super().__init__("encyclopedia", rows)


class Topics(ConversationList):
    """`What is Oslo?` with four short descriptions of articles to choose from."""

    def __init__(self) -> None:
        articles = [a for a in demo_data.articles("train") if 0 < len(a.description) <= MAX_CHOICE_CHARS]
        rows = []
        for index, article in enumerate(articles):
            rng = random.Random(f"topics {index}")
            choices = [article.description]
            while len(choices) < 4:
                other = rng.choice(articles).description
                if other not in choices:
                    choices.append(other)
            rng.shuffle(choices)
            answer = choices.index(article.description)
            rows.append(multiple_choice(Choices(f"What is {article.title}?", choices, answer)))
        super().__init__("topics", rows)


def first_sentences(text: str) -> str:
    """Return the first sentence of an article, and the second if both fit MAX_ANSWER_CHARS."""
    paragraph = text.split("\n")[0]
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph)]
    sentences = [paragraph[i:j].strip() for i, j in zip([0, *ends], [*ends, len(paragraph)], strict=True)]
    both = " ".join(sentences[:2])
    return both if len(both) <= MAX_ANSWER_CHARS else sentences[0]


def _with_article(title: str, summary: str) -> str:
    """Return the title as it is written mid-sentence, with its article: `Hat` becomes `a hat`."""
    title = re.sub(r" \(.*\)$", "", title)
    for article in _ARTICLE.finditer(summary):
        following = summary[article.end() :]
        if following[: len(title)].lower() == title.lower() and not following[len(title) :][:1].isalnum():
            return article[0].lower() + following[: len(title)]
    return title
