"""SmolTalk's subset for small models: 460K conversations on all subjects (https://arxiv.org/abs/2502.02737)."""

from typing import ClassVar

from nanochat.conversations import Conversation
from nanochat.tasks.hub_task import HubTask


class SmolTalk(HubTask):
    """Unchanged conversations, some with a system message."""

    name = "smoltalk"
    REPOSITORY = "HuggingFaceTB/smol-smoltalk"
    FILES: ClassVar = {
        "train": [f"data/train-{i:05d}-of-00004.parquet" for i in range(4)],
        "test": ["data/test-00000-of-00001.parquet"],
    }

    def row(self, index: int) -> Conversation:
        messages = self.rows[index]["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
