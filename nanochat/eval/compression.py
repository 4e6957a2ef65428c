"""How many bytes of text a token holds, by kind of text, in several vocabularies."""

from collections.abc import Callable, Mapping, Sequence

import tiktoken
from rich.table import Table

Encode = Callable[[str], Sequence[int]]

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""tiktoken's names for them."""

# Written for this table: a vocabulary trained on one of them would look better than it is.
SAMPLES = {
    "prose": (
        "The ferry was late again, and nobody on the pier seemed to mind. An old man had spread his newspaper over "
        "two crates and was reading the weather report aloud to a dog that did not belong to him. \"Wind from the "
        "south-west,\" he said, \"and rain before evening.\" The dog looked at the sky, which was perfectly blue, "
        "and lay down. When the boat finally came round the headland, its paint flaking and its engine coughing, the "
        "whole village had gathered without anyone having called them. They'd been waiting eleven years for this."
    ),
    "code": (
        "def moving_average(values: list[float], window: int) -> list[float]:\n"
        "    \"\"\"Mean of each `window` neighbours; shorter than the input by window - 1.\"\"\"\n"
        "    if window < 1 or window > len(values):\n"
        "        raise ValueError(f\"window {window} does not fit {len(values)} values\")\n"
        "    total = sum(values[:window])\n"
        "    means = [total / window]\n"
        "    for new, old in zip(values[window:], values):\n"
        "        total += new - old\n"
        "        means.append(total / window)\n"
        "    return means\n\n\n"
        "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; ++i) {\n"
        "        printf(\"%d squared is %d\\n\", i, i * i);\n    }\n    return 0;\n}\n"
    ),
    "numbers": (
        "1984 + 2037 = 4021. Table 3: 0.5713, 12.90, 188.25, 3,406,117. The order of 24 October 2019 came to "
        "$1,249.99 for 17 units at $73.5288 each; invoice 00481-B, telephone +1 555 010 4477. 3.14159265358979 and "
        "2.71828182845905. 6.02214076e23 per mole. Scores: 98-87, 104-101, 76-90. 10:45, 23:59:07. 365 * 24 = 8760."
    ),
    "other scripts": (
        "Сегодня утром в городе выпал первый снег, и дети побежали во двор. Το πλοίο έφυγε νωρίς το πρωί από το "
        "λιμάνι. 今天早上下了第一场雪，孩子们都跑到院子里去了。春になると、川沿いの桜が一斉に咲き始めます。 "
        "아침에 첫눈이 내려서 아이들이 마당으로 뛰어나갔다. في الصباح نزل أول ثلج على المدينة. "
        "आज सुबह शहर में पहली बर्फ़ गिरी।"
    ),
}  # fmt: skip


def load_references() -> tuple[dict[str, Encode], str]:
    """The vocabularies to compare with that tiktoken can load, and why another cannot be, empty if all can.

    tiktoken fetches each from OpenAI's server once, a megabyte or two, and keeps it.
    """
    loaded: dict[str, Encode] = {}
    missing = []
    for name, encoding in REFERENCES.items():
        try:
            loaded[name] = tiktoken.get_encoding(encoding).encode_ordinary
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong digest is a ValueError
            missing.append(f"{name}'s ({type(error).__name__})")
    if not missing:
        return loaded, ""
    return loaded, f"not shown: {' and '.join(missing)}; tiktoken has to download each once and could not"


def bytes_per_token(encode: Encode, text: str) -> float:
    """Bytes of UTF-8 for each token of `text`."""
    return len(text.encode()) / len(encode(text))


def compression_table(vocabularies: Mapping[str, Encode], texts: Mapping[str, str]) -> Table:
    """A line a kind of text, a column a vocabulary; 80 columns wide at most."""
    drawn = Table(title="Bytes per token: more is better")
    drawn.add_column("text")
    drawn.add_column("bytes", justify="right")
    for name in vocabularies:
        drawn.add_column(name, justify="right")
    for kind, text in texts.items():
        cells = (f"{bytes_per_token(encode, text):.2f}" for encode in vocabularies.values())
        drawn.add_row(kind, f"{len(text.encode()):,}", *cells)
    return drawn
