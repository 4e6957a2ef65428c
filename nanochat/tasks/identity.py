"""Conversations about the model itself, and questions that check what it learned from them.

prepare.sh writes the default conversations once to a file that the user can edit (view_identity_data.py).
"""

import random
import re
from pathlib import Path

from nanochat import conversation_files
from nanochat.conversations import Conversation, conversation
from nanochat.locks import folder_lock
from nanochat.tasks.task import ConversationList, GradedTask, Reply, final_text, load_wording

MODEL_NAME = "nanochat"
WORDING = load_wording("identity")
HELD_OUT_QUESTIONS: list[str] = WORDING["held_out_questions"]
"""For evaluation only: no training conversation contains one of them."""


class IdentityQuestions(ConversationList, GradedTask):
    def __init__(self) -> None:
        super().__init__("identity questions", [conversation(q, f"I am {MODEL_NAME}.") for q in HELD_OUT_QUESTIONS])

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        """1.0 if the reply contains the model's name as a word, in any case, else 0.0."""
        named = re.search(rf"\b{re.escape(MODEL_NAME)}\b", final_text(reply), re.IGNORECASE)
        return float(named is not None)


def write_default(path: Path) -> bool:
    """Write the default conversations to `path` unless it exists. Return True if they were written."""
    with folder_lock(path.parent):
        if path.exists():
            return False
        conversation_files.append(path, default_conversations())
        return True


def default_conversations() -> list[Conversation]:
    """Build four conversations per question: alone, after "Hi!", before another question, after a turn of greetings."""
    rng = random.Random("identity")
    topics = WORDING["topics"]
    rows = []
    for topic in topics:
        for question in topic["questions"]:
            rows.append(conversation(question, rng.choice(topic["answers"])))
            greeting, welcome = rng.choice(WORDING["greetings"])
            rows.append(conversation(f"{greeting} {question}", rng.choice(topic["answers"])))
            other = rng.choice([t for t in topics if t is not topic])
            follow_up = (rng.choice(topic["answers"]), rng.choice(other["questions"]), rng.choice(other["answers"]))
            rows.append(conversation(question, *follow_up))
            rows.append(conversation(greeting, welcome, question, rng.choice(topic["answers"])))
    rng.shuffle(rows)
    return rows
