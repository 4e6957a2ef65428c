"""A checkpoint that is measured: loaded at most once, and not at all where its results are kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanochat import paths
from nanochat.checkpoint import Checkpoint
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.runtime import Runtime


@dataclass
class Candidate:
    """One checkpoint and what it is measured with."""

    found: Checkpoint
    runtime: Runtime
    device_batch_size: int
    """rows of text, or replies, at a time"""

    @cached_property
    def chat(self) -> ChatModel:
        """The model. Raises UserError if it cannot be loaded."""
        found = self.found
        return load_chat(found.source, found.tag, found.step, self.runtime.device.type, self.device_batch_size)

    @property
    def batch_tokens(self) -> int:
        """Most tokens in one forward pass: so many rows of the whole context."""
        return self.device_batch_size * self.chat.context

    def result(self, suffix: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What report/<source>-<tag>-<step><suffix>.json holds if it was measured with this key, else `measure()`.

        The result must survive JSON. A new one is kept there.
        """
        found = self.found
        file = paths.report_dir() / f"{found.source}-{found.tag}-{found.step:06d}{suffix}.json"
        whole_key = {"saved_at": found.meta["saved_at"], **key}
        if file.exists():
            kept = json.loads(file.read_text())
            if kept.get("key") == whole_key:
                return kept["result"]
        result = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": whole_key, "result": result}, indent=2) + "\n")
        return result
