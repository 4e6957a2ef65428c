"""SmolTalk's subset for small models: 460K conversations on all subjects (https://arxiv.org/abs/2502.02737)."""

from typing import Literal

from nanochat.conversations import Conversation
from nanochat.tasks.hub_task import HubFiles, HubTask

REPOSITORY = "HuggingFaceTB/smol-smoltalk"
FILES = {
    "train": HubFiles(REPOSITORY, [f"data/train-{i:05d}-of-00004.parquet" for i in range(4)]),
    "test": HubFiles(REPOSITORY, ["data/test-00000-of-00001.parquet"]),
}


class SmolTalk(HubTask):
    """Unchanged conversations, some with a system message."""

    name = "smoltalk"

    def __init__(self, split: Literal["train", "test"]) -> None:
        super().__init__(FILES[split])

    def row(self, index: int) -> Conversation:
        messages = self.rows[index]["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
