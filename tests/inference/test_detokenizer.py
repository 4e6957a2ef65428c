"""Replies come as whole characters, and special tokens are never shown."""

from nanochat.conversations import Message, Part
from nanochat.inference.detokenizer import Detokenizer, reply_parts
from nanochat.tokenizer import Tokenizer


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    tokens = tokenizer.encode("a🚀b")
    texts = [delta.text if (delta := detokenizer.feed(token)) else "" for token in tokens]
    assert "".join(texts) == "a🚀b" and "" in texts and not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_a_character_cut_off_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(tokenizer.encode("🚀")[0]) is None
    rest = detokenizer.flush()
    assert rest is not None and rest.text == "\N{REPLACEMENT CHARACTER}"


def test_parts_of_a_reply_with_a_tool_call(tokenizer: Tokenizer) -> None:
    parts: list[Part] = [
        {"type": "python", "text": "1 + 2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "It is 3."},
    ]
    messages: list[Message] = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": parts}]
    whole = tokenizer.render_conversation({"messages": messages}).ids
    reply = whole[len(tokenizer.render_prompt(messages[:1])) :]
    assert reply_parts(tokenizer, reply) == parts


def shown(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> tuple[list[str], Detokenizer]:
    """Return the text shown after each token, then the text flushed at the end."""
    detokenizer = Detokenizer(tokenizer, stop)
    deltas = [detokenizer.feed(token) for token in tokenizer.encode(text)] + [detokenizer.flush()]
    return [delta.text if delta else "" for delta in deltas], detokenizer


def test_no_part_of_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    pieces, detokenizer = shown(tokenizer, "one two END three", ("END", "never"))
    assert "".join(pieces) == "one two " and detokenizer.stopped_by


def test_what_only_began_like_a_stop_string_is_shown_after_all(tokenizer: Tokenizer) -> None:
    pieces, detokenizer = shown(tokenizer, "aab aab aaab EN", ("aaac", "END"))
    assert "".join(pieces) == "aab aab aaab EN" and not detokenizer.stopped_by
    assert not any("".join(pieces[:i]).endswith(("a", "E", "EN")) for i in range(1, len(pieces)))


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(shown(tokenizer, "abcdef", ("de", "bcd", "f"))[0]) == "a"


def test_what_a_tool_is_given_is_not_searched_for_stop_strings(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("1",))
    start, end = (tokenizer.special(name) for name in ("<|python_start|>", "<|python_end|>"))
    deltas = [detokenizer.feed(token) for token in (start, *tokenizer.encode("1+1"), end, *tokenizer.encode("= 1"))]
    assert "".join(delta.text for delta in deltas if delta) == "1+1= " and detokenizer.stopped_by
