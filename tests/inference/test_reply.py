"""Replies come as whole characters, and special tokens are never shown."""

from nanochat.data.conversations import Message, Part
from nanochat.inference.reply import ReplyDecoder, reply_parts
from nanochat.tokenizer import Tokenizer


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    decoder = ReplyDecoder(tokenizer)
    tokens = tokenizer.encode("a🚀b")
    texts = [delta.text if (delta := decoder.feed(token)) else "" for token in tokens]
    assert "".join(texts) == "a🚀b" and "" in texts and not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_a_character_cut_off_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    decoder = ReplyDecoder(tokenizer)
    assert decoder.feed(tokenizer.encode("🚀")[0]) is None
    rest = decoder.flush()
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
