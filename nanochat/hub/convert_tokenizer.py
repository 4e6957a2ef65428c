"""Convert our tokenizer to the tokenizer.json of the `tokenizers` library and back."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.untrusted import read_json, reading

TOKENIZER_FILE = "tokenizer.json"
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""byte that each character of a byte-level BPE vocabulary stands for"""


def write_tokenizer(tokenizer: Tokenizer, sequence_len: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The padding token is <|bos|>, which never occurs inside a row. If it were <|assistant_end|>, trainers would mask
    that as padding and the model would forget to stop.
    """
    converter = TikTokenConverter(pattern=tokenizer.pattern, extra_special_tokens=SPECIAL_TOKENS)
    # The ranks are not in a file here.
    converter.load_tiktoken_bpe = lambda tiktoken_url: tokenizer.ranks  # type: ignore[method-assign]
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|bos|>",
        eos_token="<|assistant_end|>",
        pad_token="<|bos|>",
        model_max_length=sequence_len,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        clean_up_tokenization_spaces=False,
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(),
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # transformers 5 would write TokenizersBackend, which older readers do not know; it reads both.
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises UserError for other layouts; `verify.check_token_ids` finds other differences."""
    with reading(path, "it must be a byte-level BPE, other kinds are not supported"):
        parsed = read_json(path)
        special = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        vocabulary = parsed["model"]["vocab"].items()
        ranks = {bytes(BYTES[char] for char in name): rank for name, rank in vocabulary if name not in special}
        split, byte_level = parsed["pre_tokenizer"]["pretokenizers"]
        if (split["type"], byte_level["type"]) != ("Split", "ByteLevel"):
            raise ValueError("text is split differently")
        if changes := [name for name in ("normalizer", "truncation", "padding") if parsed.get(name)]:
            raise ValueError(f"text is changed by its {', '.join(changes)}")
        return checked_tokenizer(ranks, split["pattern"]["Regex"], special)


def checked_tokenizer(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> Tokenizer:
    """Build a tokenizer. Raises ValueError unless its ids are the ranks 0..n-1, then our nine special tokens."""
    tokenizer = Tokenizer(ranks, pattern)
    if special != tokenizer.special_ids:
        raise ValueError(f"its special tokens must be {', '.join(SPECIAL_TOKENS)}, with the ids after the ranks")
    return tokenizer
