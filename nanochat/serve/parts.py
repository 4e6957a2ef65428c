"""A reply as parts: what the model said, the tool calls it made and what they gave."""

from collections.abc import Iterable

Part = dict[str, str]  # {"type": "text" | "python" | "python_output", "text": str}


def add_delta(parts: list[Part], kind: str, text: str) -> None:
    """Add streamed text to a reply in place: it continues the last part where the type is the same."""
    if parts and parts[-1]["type"] == kind:
        parts[-1]["text"] += text
    else:
        parts.append({"type": kind, "text": text})


def text_of(parts: Iterable[Part]) -> str:
    """What the model said, without its tool calls."""
    return "".join(part["text"] for part in parts if part["type"] == "text")
