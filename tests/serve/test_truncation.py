"""Truncation of conversations that are longer than the context."""

from collections.abc import Sequence

import pytest

from nanochat.conversations import Message, text_of
from nanochat.serve.protocol import truncate_conversation


def prompt_of(messages: Sequence[Message]) -> list[int]:
    """A token for each character, and one for each message."""
    return [0] * sum(len(text_of(message)) + 1 for message in messages)


def talk(*lengths: int, system: int = 0) -> list[Message]:
    """Turns of these lengths."""
    turns: list[Message] = [{"role": "system", "content": "s" * system}] if system else []
    return turns + [{"role": ("user", "assistant")[i % 2], "content": "x" * n} for i, n in enumerate(lengths)]


def brute_force(messages: Sequence[Message], context: int, room: int) -> int:
    """Dropped messages, by trying one exchange after the other."""
    system = [message for message in messages if message["role"] == "system"]
    turns = list(messages[len(system) :])
    dropped = 0
    while len(turns) > 1 and len(prompt_of(system + turns)) > context - room:
        turns, dropped = turns[2:], dropped + 2
    return dropped


@pytest.mark.parametrize("context", [40, 60, 100, 200])
@pytest.mark.parametrize("system", [0, 9])
def test_as_few_of_the_oldest_exchanges_as_needed_are_dropped(context: int, system: int) -> None:
    messages = talk(5, 9, 20, 3, 1, 30, 8, 8, 10, system=system)
    prompt, dropped = truncate_conversation(prompt_of, messages, context, max_tokens=10)
    assert dropped == brute_force(messages, context, 10)
    assert len(prompt) == len(prompt_of(messages[: bool(system)])) + len(prompt_of(messages[bool(system) + dropped :]))


def test_a_quarter_of_the_context_is_enough_room_for_a_long_reply() -> None:
    assert truncate_conversation(prompt_of, talk(10, 10, 50), 100, max_tokens=1000)[1] == 0
    assert truncate_conversation(prompt_of, talk(10, 14, 50), 100, max_tokens=1000)[1] == 2


def test_the_last_message_stays() -> None:
    assert truncate_conversation(prompt_of, talk(10, 10, 98), 100, max_tokens=50) == ([0] * 99, 2)


def test_a_greeting_is_dropped_first() -> None:
    greeting: Message = {"role": "assistant", "content": "x" * 60}
    assert truncate_conversation(prompt_of, [greeting, *talk(10, 10, 30)], 100, max_tokens=10)[1] == 1
