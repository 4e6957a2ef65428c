"""Our tokenizer as a tokenizer.json of the `tokenizers` library, and the way back."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()
READ_BY_ALL = "PreTrainedTokenizerFast"
"""The class to name: transformers 5 reads it as its own TokenizersBackend, which older readers do not know."""


def _byte_names() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it can be seen, else one above 255."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(256, 512))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]


BYTE_NAMES = _byte_names()
BYTES = {name: byte for byte, name in enumerate(BYTE_NAMES)}


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """The same ids from the same text.

    tiktoken joins whichever neighbours make the lowest rank, in whatever way a token can be put together; so every
    such way is a merge here, in the order of the ranks. A piece of text that is a token is taken as it is.
    """
    ranks = tokenizer.ranks
    names = {token: "".join(BYTE_NAMES[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:i]], names[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    fast = FastTokenizer(BPE({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    return fast


def write_tokenizer(tokenizer: Tokenizer, sequence_len: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Padding is <|bos|>, which never stands inside a row: <|assistant_end|> must not be masked as padding, or whoever
    trains the model further unlearns to stop.
    """
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer),
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|bos|>",
        model_max_length=sequence_len,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    settings = json.loads(path.read_text()) | {"tokenizer_class": READ_BY_ALL}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, if it is one of ours or the original nanochat's.

    That is byte-level BPE whose ids are the ranks of the merges, one pattern, and our nine special tokens above them.
    Raises UserError if it is another kind.
    """
    try:
        parsed = json.loads(path.read_text())
        special = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        vocabulary = {name: rank for name, rank in parsed["model"]["vocab"].items() if name not in special}
        ranks = {bytes(BYTES[character] for character in name): rank for name, rank in vocabulary.items()}
        pattern = _pattern(parsed["pre_tokenizer"])
        model_type = parsed["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a byte-level BPE tokenizer as this project's ({type(error).__name__}: {error}): "
            "the model cannot be imported"
        ) from None
    return tokenizer_of(ranks, pattern, special, str(path), model_type == "BPE" and parsed.get("normalizer") is None)


def tokenizer_of(
    ranks: dict[bytes, int], pattern: str, special: dict[str, int], where: str, same_kind: bool = True
) -> Tokenizer:
    """A tokenizer of these parts. Raises UserError unless they are laid out as ours are."""
    in_order = sorted(ranks.values()) == list(range(len(ranks)))
    whole = all(bytes([byte]) in ranks for byte in range(256))
    wanted = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if not (same_kind and in_order and whole and special == wanted):
        raise UserError(
            f"the tokenizer in {where} has another layout than this project's (byte-level BPE, its ids the ranks, then "
            f"{', '.join(SPECIAL_TOKENS)}): the model cannot be imported"
        )
    try:
        return Tokenizer(ranks, pattern)
    except Exception as error:  # tiktoken's own, for a pattern that is no regular expression
        raise UserError(f"the tokenizer in {where} cannot be used ({error})") from None


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression that text is split with. Raises KeyError or ValueError if it is split in another way."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("text is split in another way")
    split, byte_level = steps
    if split["behavior"] != "Isolated" or split["invert"] or byte_level["add_prefix_space"] or byte_level["use_regex"]:
        raise ValueError("text is split in another way")
    return str(split["pattern"]["Regex"])
