"""Who the model is: conversations about itself, and the questions that check what it learned.

The conversations are written to a file of the user's once, to be edited (view_identity_data.py), and read from
there; `HELD_OUT_QUESTIONS` are never among those written.
"""

import random
import re
from pathlib import Path

from nanochat import conversations
from nanochat.conversations import Conversation, conversation
from nanochat.tasks.identity_text import GREETINGS, HELD_OUT_QUESTIONS, MODEL_NAME, TOPICS
from nanochat.tasks.task import GradedTask, Reply, Task, final_text


class Identity(Task):
    """The conversations in the user's file. Raises UserError if it cannot be read or holds a broken line."""

    name = "identity"

    def __init__(self, path: Path) -> None:
        self._rows = conversations.read(path)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Conversation:
        return self._rows[index]


class IdentityQuestions(GradedTask):
    """Five ways to ask who the model is that no training conversation uses."""

    name = "identity questions"

    def __init__(self, model_name: str = MODEL_NAME) -> None:
        self.model_name = model_name

    def __len__(self) -> int:
        return len(HELD_OUT_QUESTIONS)

    def row(self, index: int) -> Conversation:
        return conversation(HELD_OUT_QUESTIONS[index], f"I am {self.model_name}.")

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply contains the model's name as a word, in any case, else 0.0."""
        named = re.search(rf"\b{re.escape(self.model_name)}\b", final_text(reply), re.IGNORECASE)
        return float(named is not None)


def write_default(path: Path) -> bool:
    """Write the default conversations to `path` unless a file is there; whether it was written."""
    return conversations.write_if_absent(path, default_conversations())


def default_conversations() -> list[Conversation]:
    """Every question once, half of them after a greeting or with a second question; always the same list."""
    rng = random.Random("identity")
    topics = list(TOPICS)
    rows = []
    for topic in topics:
        for question in topic.questions:
            rows.append(conversation(question, rng.choice(topic.answers)))
            greeting, welcome = rng.choice(GREETINGS)
            rows.append(conversation(f"{greeting} {question}", rng.choice(topic.answers)))
            other = rng.choice([t for t in topics if t is not topic])
            turns = [question, rng.choice(topic.answers), rng.choice(other.questions), rng.choice(other.answers)]
            rows.append(conversation(*turns))
            rows.append(conversation(greeting, welcome, question, rng.choice(topic.answers)))
    rng.shuffle(rows)
    return rows
