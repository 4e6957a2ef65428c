import json
import threading
from pathlib import Path
from typing import Any

import pytest

from nanochat import conversation_files
from nanochat.conversation_files import find_problem
from nanochat.conversations import conversation
from nanochat.errors import UserError

pytestmark = pytest.mark.usefixtures("base_dir")
HALF_A_PAIR = rb'{"prompt": "\ud800", "completion": "x"}'
GOOD = conversation("Hi!", [{"type": "python", "text": "1 + 1"}, {"type": "python_output", "text": ""}])


def messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    "value",
    [
        conversation("Hi!", "Hello!"),
        GOOD,
        messages(("system", "Be kind."), ("user", "Hi!"), ("assistant", "Hello!")),
        messages(("user", "Hi!"), ("assistant", "Hello!"), ("user", "Bye!")),
    ],
)
def test_valid_conversations(value: Any) -> None:
    assert find_problem(value) is None


CHAT = conversation("Hi!", "Hello!")
SYSTEM_CHAT = messages(("system", "Be kind."), ("user", "Hi!"), ("assistant", "Hello!"))
SHAREGPT = [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello!"}]
PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (CHAT, CHAT),
        (CHAT | {"id": 7, "source": "x"}, CHAT),
        (messages(("developer", "Be kind."), ("user", "Hi!"), ("assistant", "Hello!")), SYSTEM_CHAT),
        (messages(("system", ""), ("user", "Hi!"), ("assistant", "Hello!")), CHAT),
        (messages(("user", PARTS), ("assistant", "Hello!")), CHAT),
        ({"conversations": SHAREGPT}, CHAT),
        ({"system": "Be kind.", "conversations": SHAREGPT}, SYSTEM_CHAT),
        ({"conversations": CHAT["messages"]}, CHAT),
        ({"instruction": "Translate.", "input": "Hi!", "output": "Hoi!"}, conversation("Translate.\n\nHi!", "Hoi!")),
        ({"instruction": "Hi!", "input": "", "output": "Hello!"}, CHAT),
        ({"prompt": "Hi!", "completion": "Hello!"}, CHAT),
        ({"prompt": SYSTEM_CHAT["messages"][:2], "completion": SYSTEM_CHAT["messages"][2:]}, SYSTEM_CHAT),
        ({"question": "1 + 1?", "answer": 2}, conversation("1 + 1?", "2")),
        ({"question": "Hi!", "answer": GOOD["messages"][1]["content"]}, GOOD),
        (
            {"question": "Hi!", "answer": "Hello!", "grader": "exact", "rule": "."},
            {**CHAT, "grader": "exact", "rule": "."},
        ),
    ],
)
def test_other_formats_are_converted(record: Any, expected: Any) -> None:
    converted = conversation_files.convert(record)
    assert converted == expected and find_problem(converted) is None
    assert conversation_files.convert(converted) == converted


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": SHAREGPT[1:]}, "message 1 is from the assistant"),
        ({"conversations": [{"from": "narrator", "value": "Once."}]}, "not 'narrator'"),
        ({"conversations": [{"from": ["human"], "value": "Hi!"}]}, '"role"'),
        ({"conversations": ["Hi!"]}, '"role"'),
        ({"conversations": "Hi!"}, 'a list "messages"'),
        ({"conversations": [{"from": "human"}]}, '"content"'),
        ({"instruction": "Hi!"}, "instruction/output"),
        ({"instruction": "Hi!", "output": None}, 'message 2 needs a "content"'),
        ({"prompt": "Hi!", "completion": ""}, "message 2 is empty"),
        ({"text": "Hi!"}, "prompt/completion"),
        ("Hi!", 'a list "messages"'),
        (None, 'a list "messages"'),
    ],
)
def test_what_cannot_be_converted_has_a_reason(record: Any, reason: str) -> None:
    assert reason in str(find_problem(conversation_files.convert(record)))


def test_a_folder_and_a_json_array_are_read(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([CHAT, {"prompt": "a", "completion": "b"}], indent=1))
    (tmp_path / "more" / "b.jsonl").write_text(f"{json.dumps(GOOD)}\n{{oops\n")
    (tmp_path / "notes.txt").write_text("no data")
    found = [(line.file.name, line.number, line.problem is None) for line in conversation_files.scan(tmp_path)]
    assert found == [("a.json", 1, True), ("a.json", 2, True), ("b.jsonl", 1, True), ("b.jsonl", 2, False)]
    with pytest.raises(UserError, match=r"line 2 of .*b\.jsonl"):
        conversation_files.read(tmp_path)
    (tmp_path / "more" / "b.jsonl").unlink()
    assert len(conversation_files.read(tmp_path)) == 2
    with pytest.raises(UserError, match=r"no \.jsonl or \.json files"):
        conversation_files.read(tmp_path / "more")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], 'a list "messages"'),
        ({"messages": "Hi!"}, 'a list "messages"'),
        (messages(), "at least one user message"),
        (messages(("user", "Hi!")), "at least one user message"),
        (messages(("system", "a"), ("system", "b"), ("user", "c")), "message 2 is from the system"),
        (messages(("assistant", "Hi!"), ("user", "Hi!")), "message 1 is from the assistant"),
        (messages(("user", "Hi!"), ("user", "Hi!")), "message 2 is from the user, expected the assistant"),
        (messages(("robot", "Hi!")), '"role"'),
        (messages(("user", " \n")), "message 1 is empty"),
        (messages(("user", 7)), '"content"'),
        (messages(("user", [{"type": "text", "text": "Hi!"}])), "only for the assistant"),
        (messages(("user", "Hi!"), ("assistant", [])), "message 2 is empty"),
        (messages(("user", "Hi!"), ("assistant", [{"type": "image", "text": "a"}])), "has a part that is not"),
        (messages(("user", "Hi!"), ("assistant", [{"type": "text"}])), "has a part that is not"),
        (messages(("user", "Hi!"), ("assistant", [{"type": "python", "text": ""}])), "an empty python part"),
    ],
)
def test_find_problem_names_the_reason(value: Any, reason: str) -> None:
    problem = find_problem(value)
    assert problem is not None and reason in problem


def test_scan_gives_each_line_its_number_and_problem(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b"\n".join([good, b"", b"{oops", b"\xff", b"{}", b"[" * 100_000, good + b"\r", b"", HALF_A_PAIR])
    )
    lines = list(conversation_files.scan(path))
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7, 9]
    assert [line.conversation == GOOD for line in lines] == [True, False, False, False, False, True, False]
    assert all((line.problem is None) == (line.conversation is not None) for line in lines)


def test_a_text_with_unicode_line_separators_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    conversation_files.append(path, [conversation("a\u2028b\x85c", "d")])
    assert conversation_files.read(path) == [conversation("a\u2028b\x85c", "d")]


def test_read_names_the_broken_line_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(UserError, match=r"line 2 of .*chats\.jsonl is invalid"):
        conversation_files.read(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_read_refuses_an_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="is empty"):
        conversation_files.read(path)


def test_read_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        conversation_files.read(tmp_path / "absent.jsonl")


def test_append_keeps_every_old_byte(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    old = b"{half a line\xff\n\n  {}\r\n{no newline at the end"
    path.write_bytes(old)
    conversation_files.append(path, [GOOD])
    assert path.read_bytes() == old + b"\n" + json.dumps(GOOD).encode() + b"\n"


def test_append_writes_through_a_link_and_keeps_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "mine" / "chats.jsonl", tmp_path / "link.jsonl"
    conversation_files.append(target, [GOOD])
    assert [path.name for path in target.parent.iterdir()] == ["chats.jsonl"]
    target.chmod(0o640)
    link.symlink_to(target)
    conversation_files.append(link, [GOOD])
    assert link.is_symlink() and len(conversation_files.read(target)) == 2
    assert target.stat().st_mode & 0o777 == 0o640


def test_appending_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    threads = [
        threading.Thread(target=conversation_files.append, args=(path, [conversation(f"{i}", "ok")])) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(str(c["messages"][0]["content"])) for c in conversation_files.read(path)) == list(range(16))
    assert not list(tmp_path.glob("*.partial"))


def test_append_refuses_what_is_not_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    with pytest.raises(ValueError, match="is empty"):
        conversation_files.append(path, [conversation("", "")])
    assert not path.exists()


def test_append_to_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        conversation_files.append(tmp_path / "file" / "chats.jsonl", [GOOD])
