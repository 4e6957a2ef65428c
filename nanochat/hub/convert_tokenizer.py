"""Convert our tokenizer to the tokenizer.json of the `tokenizers` library and back."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""transformers 5 would write TokenizersBackend, which older readers do not know; it reads both."""
BYTE_NAMES: dict[int, str] = bytes_to_unicode()
"""character that byte-level BPE writes for each byte"""
BYTES = {name: byte for byte, name in BYTE_NAMES.items()}


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """Build a tokenizer that gives the same ids.

    tiktoken always joins the two neighbors whose token has the lowest rank, no matter how that token can be split.
    Therefore every way to split a token is a merge here, in rank order, and a piece of text that is a token is taken
    as it is (ignore_merges).
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

    The padding token is <|bos|>, which never occurs inside a row. If it were <|assistant_end|>, trainers would mask
    that as padding and the model would forget to stop.
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
    settings = json.loads(path.read_text()) | {"tokenizer_class": TOKENIZER_CLASS}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises UserError unless it has the layout of `checked_tokenizer`."""
    try:
        parsed = json.loads(path.read_text())
        special = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        vocabulary = {name: rank for name, rank in parsed["model"]["vocab"].items() if name not in special}
        ranks = {bytes(BYTES[character] for character in name): rank for name, rank in vocabulary.items()}
        pattern = _pattern(parsed["pre_tokenizer"])
        if parsed["model"]["type"] != "BPE" or parsed.get("normalizer") is not None:
            raise ValueError("not BPE, or text is normalized")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must be a byte-level BPE tokenizer ({type(error).__name__}: {error}): other kinds are not "
            "supported"
        ) from None
    return checked_tokenizer(ranks, pattern, special, str(path))


def checked_tokenizer(ranks: dict[bytes, int], pattern: str, special: dict[str, int], where: str) -> Tokenizer:
    """Build a tokenizer. Raises UserError unless its ids are the ranks 0..n-1, then our nine special tokens."""
    consecutive = sorted(ranks.values()) == list(range(len(ranks)))
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    expected = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if not (consecutive and has_all_bytes and special == expected):
        raise UserError(
            f"the ids of the tokenizer in {where} must be the BPE ranks, then {', '.join(SPECIAL_TOKENS)}: other "
            "layouts are not supported"
        )
    try:
        return Tokenizer(ranks, pattern)
    except Exception as error:  # tiktoken has no class of its own for a pattern that is not a regular expression
        raise UserError(f"the tokenizer in {where} is invalid ({error})") from None


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The regular expression that splits text. Raises KeyError or ValueError if text is split another way."""
    split, byte_level = pre_tokenizer["pretokenizers"]
    if (
        (split["type"], byte_level["type"]) != ("Split", "ByteLevel")
        or (split["behavior"], split["invert"]) != ("Isolated", False)
        or byte_level["add_prefix_space"]
        or byte_level["use_regex"]
    ):
        raise ValueError("text is split another way")
    return str(split["pattern"]["Regex"])
