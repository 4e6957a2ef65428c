"""Small talk: the openings of human conversations that come with the installation."""

from nanochat.conversations import Conversation
from nanochat.data import embedded
from nanochat.tasks.task import Split, Task


class SmallTalk(Task):
    """Conversations of two to six short turns."""

    name = "small talk"

    def __init__(self, split: Split = "train") -> None:
        self._rows = embedded.chitchat("train" if split == "train" else "val")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Conversation:
        return self._rows[index]
