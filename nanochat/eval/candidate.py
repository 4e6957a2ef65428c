"""A checkpoint that is measured: loaded at most once, and not at all where its results are kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.inference.chat import ChatModel, load_chat
from nanochat.runtime import Runtime
from nanochat.train.checkpoint import Checkpoint


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
        whole_key = {"saved_at": self.found.meta["saved_at"], **key}
        kept = kept_result(self.found, suffix)
        if kept and kept[0] == whole_key:
            return kept[1]
        result = measure()
        file = result_file(self.found, suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": whole_key, "result": result}, indent=2) + "\n")
        return result


def result_file(found: Checkpoint, suffix: str) -> Path:
    """Where a result of a checkpoint is kept."""
    return paths.report_dir() / f"{found.source}-{found.tag}-{found.step:06d}{suffix}.json"


def kept_result(found: Checkpoint, suffix: str) -> tuple[dict[str, Any], Any] | None:
    """What was measured of a checkpoint: the key that it was measured with, and the result. None if nothing was."""
    try:
        kept = json.loads(result_file(found, suffix).read_text())
        is_its_own = kept["key"]["saved_at"] == found.meta["saved_at"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return (kept["key"], kept["result"]) if is_its_own else None
