"""Text to hold two tokenizers against each other: every kind that is known to tell them apart."""

import random

from nanochat.tokenizer import SPECIAL_TOKENS

WORDS = (
    "the", "of", "and", "model", "token", "when", "they'd", "we've", "I'm", "it's", "DON'T", "o'clock", "naïve",
    "façade", "Übung", "3rd", "x86_64", "snake_case", "camelCase", "https://example.org/a?b=c&d=1", "user@example.org",
    "don’t", "e.g.", "U.S.A.", "C++", "#42", "@home", "100%", "$1,249.99", "1e-07", "0xFF", "3.14159",
)  # fmt: skip
CODE = (
    "def f(x: int) -> int:\n", "    return x ** 2 + 1  # why\n", "\tif (a[i] != b && !c) { ++n; }\n", "for (;;) {}\r\n",
    "import numpy as np\n\n\n", "SELECT * FROM t WHERE id >= 10;\n", "<div class=\"a\">&nbsp;</div>\n", "'''doc'''\n",
    "std::vector<std::pair<int, int>> v;\n", "$\\frac{1}{2}$ \\n \\t \\\\\n", "{\"key\": [1, 2.5, null, true]}\n",
)  # fmt: skip
EMOJI = ("🚀", "👩🏽‍🚀", "🇫🇷", "👨‍👩‍👧‍👦", "❤️", "1️⃣", "🏴‍☠️", "🫠", "😂😂😂", "✅")
SCRIPTS = (
    (0x0400, 0x04FF), (0x0370, 0x03FF), (0x0590, 0x05FF), (0x0600, 0x06FF), (0x0900, 0x097F), (0x0E00, 0x0E7F),
    (0x10A0, 0x10FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F9FF), (0x1D400, 0x1D7FF),
)  # fmt: skip
"""Ranges of code points: Cyrillic, Greek, Hebrew, Arabic, Devanagari, Thai, Georgian, kana, Han, Hangul, symbols."""
SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\ufeff", "\u200b", "\x00", "\x85")


def trying_texts(count: int, seed: int = 0) -> list[str]:
    """`count` texts, always the same ones for a seed; one kind after the other."""
    rng = random.Random(f"texts {seed}")
    kinds = (_prose, _code, _emoji, _digits, _script, _spaces, _look_alike, _anything, _repeated)
    return ["", *(kinds[i % len(kinds)](rng) for i in range(count - 1))]


def _prose(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(1, 30))
    return "".join(word + rng.choice((" ", " ", " ", ", ", ". ", "\n", "\n\n", "--", "")) for word in words)


def _code(rng: random.Random) -> str:
    return "".join(rng.choice(("", "    ", "\t\t")) + line for line in rng.choices(CODE, k=rng.randint(1, 8)))


def _emoji(rng: random.Random) -> str:
    return "".join(rng.choices((*EMOJI, *WORDS[:6], " "), k=rng.randint(1, 20)))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789" * 3 + ".,-+ ()/:²½٣५", k=rng.randint(1, 60)))


def _script(rng: random.Random) -> str:
    first, last = rng.choice(SCRIPTS)
    return "".join(rng.choice((chr(rng.randint(first, last)),) * 6 + (" ", "1")) for _ in range(rng.randint(1, 60)))


def _spaces(rng: random.Random) -> str:
    return "".join(rng.choices((*SPACES, *WORDS[:4], "'s", "'LL", "'ſ", "1"), k=rng.randint(1, 25)))


def _look_alike(rng: random.Random) -> str:
    """What looks like a special token, whole, broken and glued to text."""
    pieces = (*SPECIAL_TOKENS, "<|", "|>", "<|bos", "assistant_end|>", "<|BOS|>", "<||>", " ", "a", "\n")
    return "".join(rng.choices(pieces, k=rng.randint(1, 10)))


def _anything(rng: random.Random) -> str:
    """Any code points at all, but halves of surrogate pairs, which are no text."""
    points = (rng.choice((rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF))) for _ in range(rng.randint(1, 40)))
    return "".join(map(chr, points))


def _repeated(rng: random.Random) -> str:
    """The same few characters over and over: where two ways to join neighbours overlap."""
    return rng.choice((*WORDS, *EMOJI, *SPACES, "a", "ab", "=", "-", "0", "é", "的")) * rng.randint(1, 120)
