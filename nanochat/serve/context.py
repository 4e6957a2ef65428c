"""Making a conversation fit what the model can read."""

import bisect
from collections.abc import Callable, Sequence

from nanochat.conversations import Message
from nanochat.serve.protocol import ApiError

LEAST_SHARE_FOR_THE_REPLY = 4
"""a quarter of the context is kept free, or max_tokens if that is less"""


def fit(
    prompt_of: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message], context: int, max_tokens: int
) -> tuple[list[int], int]:
    """The prompt of a conversation, and how many of its messages had to be left out.

    The oldest turns go first, question and answer together; the system message and the last message stay. Raises
    ApiError if what must stay leaves no room for a single token of an answer.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    room = min(max_tokens, context // LEAST_SHARE_FOR_THE_REPLY)

    def kept(exchanges_dropped: int) -> list[int]:
        return prompt_of([*system, *turns[2 * exchanges_dropped :]])

    exchanges = len(turns) // 2  # before the last message
    dropped = bisect.bisect_left(range(exchanges), True, key=lambda n: len(kept(n)) <= context - room)
    prompt = kept(dropped)
    if len(prompt) >= context:
        raise ApiError(
            400,
            f"the last message alone takes {len(prompt)} tokens and the model reads at most {context}: shorten it",
            code="context_length_exceeded",
            param="messages",
        )
    return prompt, 2 * dropped
