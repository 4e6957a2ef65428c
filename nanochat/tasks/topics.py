"""Multiple choice made from the embedded encyclopedia: what is it that an article describes?"""

import random

from nanochat.conversations import Conversation
from nanochat.data import embedded
from nanochat.tasks.multiple_choice import Choices, multiple_choice
from nanochat.tasks.task import Task

CHOICES = 4
MAX_CHARACTERS = 40


class Topics(Task):
    """`What is Oslo?` with four of the articles' short descriptions, one of them its own; train articles only."""

    name = "topics"

    def __init__(self) -> None:
        self._articles = [a for a in embedded.articles("train") if 0 < len(a.description) <= MAX_CHARACTERS]

    def __len__(self) -> int:
        return len(self._articles)

    def row(self, index: int) -> Conversation:
        article = self._articles[index]
        rng = random.Random(f"{self.name} {index}")
        choices = [article.description]
        while len(choices) < CHOICES:
            other = rng.choice(self._articles).description
            if other not in choices:
                choices.append(other)
        rng.shuffle(choices)
        return multiple_choice(Choices(f"What is {article.title}?", choices, choices.index(article.description)))
