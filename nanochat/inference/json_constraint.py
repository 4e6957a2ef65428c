"""Constrained decoding: restricts a reply to JSON that matches a schema, with llguidance."""

import functools
import logging

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MAX_SCHEMA_CHARACTERS = 20_000  # compiling as many takes up to 0.3 s, in which the engine waits
MIN_SPARE = 8  # the reply is closed when fewer tokens are left over
CLOSING = ('",0', '}]",0')
"""Characters that end JSON soonest, best first, within a string and outside."""


class JsonConstraint:
    """Computes which tokens may come next, and closes the JSON in time if the reply must end before the model does."""

    def __init__(self, schema: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._llguidance = _ll_tokenizer(tokenizer)
        self._matcher = _matcher(schema, tokenizer).deep_copy()
        self._ending: list[int] = []  # tokens that close the JSON, once there is only room for these
        self._check_at: float = np.inf  # number of remaining tokens at which to look for an ending again
        self._closing = [[tokenizer.encode(character)[0] for character in text] for text in CLOSING]
        (self._letter,) = tokenizer.encode("x")  # allowed only within strings

    def allowed(self, remaining: int) -> np.ndarray:
        """Return which tokens may come next, (vocab_size,) bool. remaining: number of tokens until the reply is cut."""
        if not self._ending and remaining <= self._check_at:
            ending = self._find_ending(remaining)
            spare = remaining - len(ending)
            if ending and spare < MIN_SPARE:
                self._ending = ending
            self._check_at = remaining - max(1, spare // 8)
        mask = np.zeros(self._tokenizer.vocab_size, dtype=bool)
        if self._ending:
            mask[self._ending.pop(0)] = True
        elif self._matcher.is_error():
            log.warning("a reply ends early because its JSON schema is too complex: %s", self._matcher.get_error())
            mask[self._llguidance.eos_token] = True
        else:
            mask |= _unpack(self._matcher, len(mask))
        return mask

    def advance(self, token: int) -> None:
        """Add a token to the reply."""
        self._matcher.consume_token(token)

    def _find_ending(self, limit: int) -> list[int]:
        """Return at most `limit` tokens that complete the JSON, empty if none are found. Greedy, so not the fewest."""
        matcher, tokens = self._matcher.deep_copy(), list[int]()
        end = self._llguidance.eos_token
        while len(tokens) < limit and end not in tokens:
            forced = matcher.compute_ff_tokens()
            if not forced:
                mask = _unpack(matcher, self._tokenizer.vocab_size)
                closing = self._closing[not mask[self._letter]]
                forced = [next((token for token in (end, *closing) if mask[token]), int(mask.argmax()))]
            tokens += forced
            matcher.consume_tokens(forced)
        return tokens if end in tokens else []


def check_schema(schema: str) -> None:
    """Raise UserError if the JSON schema is too long, or llguidance does not support it."""
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        raise UserError(f"the JSON schema must have at most {MAX_SCHEMA_CHARACTERS} characters, got {len(schema)}")
    try:
        problem = LLMatcher.validate_grammar(_grammar(schema))
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"the JSON schema is not supported: {' '.join(problem.split())}")


def _grammar(schema: str) -> str:
    # Without optional whitespace, which small models tend to repeat forever.
    return LLMatcher.grammar_from_json_schema(
        schema,
        overrides={
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
            "coerce_one_of": True,  # read oneOf as anyOf
        },
    )


def _unpack(matcher: LLMatcher, vocab_size: int) -> np.ndarray:
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, count=vocab_size, bitorder="little").astype(bool)


@functools.lru_cache(maxsize=16)
def _matcher(schema: str, tokenizer: Tokenizer) -> LLMatcher:
    return LLMatcher(_ll_tokenizer(tokenizer), _grammar(schema))


@functools.lru_cache(maxsize=2)  # one per tokenizer; takes 20 ms for 4,096 tokens
def _ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    ends = [tokenizer.special("<|assistant_end|>"), tokenizer.bos_id]
    return lltokenizer_from_encoding(tokenizer._encoding, eos_token=ends)
