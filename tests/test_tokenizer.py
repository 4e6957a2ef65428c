"""Text to tokens and back, and conversations to tokens with their mask."""

import random
from pathlib import Path

import numpy as np
import pytest

from nanochat.conversations import Conversation, Message
from nanochat.errors import UserError
from nanochat.hub.verify import sample_texts
from nanochat.tokenizer import RANKS_FILE, SETTINGS_FILE, SPECIAL_TOKENS, Tokenizer, pieces

TEXTS = ["Hello, world!", "naïve café 東京 🚀🇫🇷", "x = 12345 * 67\n\n\tend  ", "<|assistant_end|><|bos|>", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_ids.values())
    for name in SPECIAL_TOKENS:
        assert not special & set(tokenizer.encode(f"a{name}b"))
    chat: Conversation = {
        "messages": [{"role": "user", "content": "<|assistant_end|>"}, {"role": "assistant", "content": "x"}]
    }
    assert tokenizer.render_conversation(chat).ids.count(tokenizer.special("<|assistant_end|>")) == 1


def test_numbers_are_split_in_groups_of_two(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("1234567")]
    assert "".join(pieces) == "1234567" and max(map(len, pieces)) <= 2


def test_token_bytes_counts_raw_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes[:256].tolist() == [1] * 256  # half characters too
    assert tokenizer.token_bytes[-len(SPECIAL_TOKENS) :].tolist() == [0] * len(SPECIAL_TOKENS)
    for text in TEXTS:
        assert int(tokenizer.token_bytes[np.array(tokenizer.encode(text), int)].sum()) == len(text.encode())


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash and loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert {path.name for path in tmp_path.iterdir()} == {RANKS_FILE, SETTINGS_FILE}


def test_another_tokenizer_is_set_aside_and_the_same_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    other = Tokenizer.train(["some other text"] * 3, 270)
    assert other.save(folder) is None and other.save(folder) is None
    aside = tokenizer.save(folder)
    assert aside is not None and aside.name.startswith("tokenizer.")
    assert Tokenizer.load(aside).hash == other.hash and Tokenizer.load(folder).hash == tokenizer.hash
    assert set(tmp_path.iterdir()) == {folder, aside}


def test_a_save_that_fails_leaves_the_old_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    other = Tokenizer.train(["some other text"] * 3, 270)
    other.save(folder)
    (tmp_path / ".tokenizer.partial").write_text("in the way")
    with pytest.raises(FileExistsError):
        tokenizer.save(folder)
    assert Tokenizer.load(folder).hash == other.hash


def test_missing_and_damaged_files_get_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\./prepare\.sh"):
        Tokenizer.load(tmp_path / "nothing")
    tokenizer.save(tmp_path)
    ranks = (tmp_path / RANKS_FILE).read_text()
    (tmp_path / RANKS_FILE).write_text(ranks[: len(ranks) // 2])
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_million_equal_blanks_are_encoded_in_pieces(tokenizer: Tokenizer) -> None:
    for blank in (" ", "\t", "\xa0"):  # tiktoken panics on them
        text = "Hi" + 1_000_000 * blank + "there"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert Tokenizer.train(["Hi" + 1_000_000 * " " + "there"], 266).ranks


def test_pieces_have_the_ids_of_the_whole_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in sample_texts(1000) if " " in text]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr("nanochat.tokenizer.MAX_PIECE", 40)
    compared = 0
    for text, ids in zip(texts, whole, strict=True):
        parts = list(pieces(text))
        assert "".join(parts) == text
        if len(parts) > 1 and max(map(len, parts[:-1])) < 40:  # all were cut before a space
            assert tokenizer.encode(text) == ids
            compared += 1
    assert compared > 100


def test_every_flipped_bit_gets_a_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    rng = random.Random(0)
    for name in 20 * (RANKS_FILE, SETTINGS_FILE):
        content = (tmp_path / name).read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            assert Tokenizer.load(tmp_path).hash == tokenizer.hash  # an entry that is not read
        except UserError as error:
            assert str(tmp_path) in str(error)
        (tmp_path / name).write_bytes(content)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="265"):
        Tokenizer.train(["text"], 100)


def test_mask_covers_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    chat: Conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2+3?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see. "},
                    {"type": "python", "text": "2+3"},
                    {"type": "python_output", "text": "5"},
                    {"type": "text", "text": "It is 5."},
                ],
            },
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome"},
        ]
    }
    ids, mask = tokenizer.render_conversation(chat)
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>Be brief.\n\nWhat is 2+3?<|user_end|><|assistant_start|>Let me see. <|python_start|>2+3"
        "<|python_end|><|output_start|>5<|output_end|>It is 5.<|assistant_end|><|user_start|>Thanks<|user_end|>"
        "<|assistant_start|>Welcome<|assistant_end|>"
    )
    learned = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
    assert learned == "Let me see. <|python_start|>2+3<|python_end|>It is 5.<|assistant_end|>Welcome<|assistant_end|>"


def test_prompt_is_the_beginning_of_the_conversation(tokenizer: Tokenizer) -> None:
    messages: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole = tokenizer.render_conversation({"messages": messages}).ids
    prompt = tokenizer.render_prompt(messages[:1])
    assert whole[: len(prompt)] == prompt and prompt[-1] == tokenizer.special("<|assistant_start|>")
