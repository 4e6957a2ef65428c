"""ChatCORE in batches against one problem at a time."""

import json
import math
from pathlib import Path

import pytest
import torch

from nanochat.conversations import Conversation, conversation
from nanochat.dist import World
from nanochat.errors import UserError
from nanochat.eval.chat_eval import ChatCore, ChatTasks, letter_grades, reply_grades, sample_indices
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.runtime import Runtime
from nanochat.sandbox import runner
from nanochat.sandbox.runner import missing_protection
from nanochat.tasks.multiple_choice import CategoricalTask, Choices
from nanochat.tasks.task import GradedTask, Reply
from nanochat.tokenizer import Tokenizer
from scripts.chat_eval import EvalOptions, answer_bits_per_byte, load_own
from tests.conftest import StartHub, random_model


class Colors(CategoricalTask):
    """Three to five choices, some questions far longer than others."""

    name = "colors"

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 12

    def choices(self, index: int) -> Choices:
        names = ["red", "green", "blue", "white", "black"][: 3 + index % 3]
        return Choices(f"Which color is number {index}{' of these' * (index % 4)}?", names, index // 3 % 3)


class Echo(GradedTask):
    """Graded by the length of the reply, which every model gives differently."""

    name = "echo"

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Conversation:
        return conversation(f"Say {index} times: {'hello ' * 3 * index}", "hello")

    def grade(self, conversation: Conversation, reply: Reply) -> float:
        return len(str(reply)) / 1000


def random_chat(tokenizer: Tokenizer, context: int) -> ChatModel:
    model = random_model(tokenizer.vocab_size, sequence_len=context)
    return ChatModel("sft", Engine(model, tokenizer, max_batch_size=4))


@pytest.mark.parametrize("batch_tokens", [1, 400, 10_000])
@pytest.mark.parametrize("context", [64, 256])
def test_the_likeliest_letter_after_the_prompt_is_the_answer(
    tokenizer: Tokenizer, batch_tokens: int, context: int
) -> None:
    task, chat = Colors(), random_chat(tokenizer, context)
    expected = []
    for i in range(len(task)):
        prompt = tokenizer.render_prompt(task[i]["messages"][:-1])[-(context - 1) :]
        with torch.no_grad():
            logits = chat.engine.model(torch.tensor([prompt]))[0, -1]
        letters = task.letters(i)
        best = max(letters, key=lambda letter: float(logits[tokenizer.encode(letter)[0]]))
        expected.append(float(best == task[i]["messages"][-1]["content"]))
    assert letter_grades(chat, task, range(len(task)), batch_tokens) == expected
    assert len(set(expected)) == 2


def test_replies_in_a_batch_are_graded_as_one_at_a_time(tokenizer: Tokenizer) -> None:
    task, chat = Echo(), random_chat(tokenizer, 512)
    assert reply_grades(chat, task, range(6)) == [reply_grades(chat, task, [i])[0] for i in range(6)]
    assert sum(reply_grades(chat, task, range(6), max_tokens=4)) < sum(reply_grades(chat, task, range(6)))


def test_a_prompt_longer_than_the_context_is_still_answered(tokenizer: Tokenizer) -> None:
    assert len(reply_grades(random_chat(tokenizer, 32), Echo(), range(9))) == 9


def test_a_sample_is_spread_and_always_the_same() -> None:
    assert sample_indices(14_042, 100) == sample_indices(14_042, 100)
    assert max(sample_indices(14_042, 100)) > 10_000
    assert sorted(sample_indices(5, 100)) == [0, 1, 2, 3, 4]


def test_code_that_cannot_be_confined_is_refused_before_anything_is_fetched(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "missing_protection", lambda: "no Landlock")
    with pytest.raises(UserError, match="--unconfined-code"):
        ChatCore()
    assert not list(base_dir.iterdir())


@pytest.mark.usefixtures("base_dir")
@pytest.mark.skipif(missing_protection() is not None, reason=f"{missing_protection()}")
def test_the_six_tasks_of_a_random_model(start_hub: StartHub, tokenizer: Tokenizer) -> None:
    start_hub()
    scores = ChatCore(4).evaluate(random_chat(tokenizer, 128), 1000, lambda task: None).scores
    assert [s.task for s in scores] == ["arc easy", "arc challenge", "mmlu", "gsm8k", "humaneval", "letter count"]
    assert [s.problems for s in scores] == [4] * 6
    assert [s.baseline for s in scores][2:] == [0.25, 0, 0, 0]
    assert all(s.accuracy == 0 for s in scores[3:])


def test_own_problems_are_graded_and_conversations_measured(
    base_dir: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows: list[dict[str, object]] = [
        {"question": f"{i}?", "answer": "a", "grader": "regex", "rule": "^"} for i in range(6)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n" for _ in "ab")
    )
    names = [str(tmp_path / "problems.jsonl"), str(tmp_path / "chats.jsonl")]
    graded, chats = load_own(EvalOptions(task=names))
    chat = random_chat(tokenizer, 64)
    (scored,) = ChatTasks(graded, 4).evaluate(chat, 1000, lambda task: None).scores
    assert (scored.task, scored.problems, scored.accuracy) == ("problems.jsonl", 4, 1.0)

    ids, mask = (torch.tensor(part) for part in tokenizer.render_conversation(chats[0][0]))
    with torch.no_grad():
        losses = -chat.engine.model(ids[None, :-1])[0].float().log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    num_bytes = torch.from_numpy(tokenizer.token_bytes)[ids[1:]] * mask[1:]
    expected = float(losses[num_bytes > 0].sum()) / math.log(2) / int(num_bytes.sum())
    runtime = Runtime(torch.device("cpu"), torch.float32, World())
    assert answer_bits_per_byte(chat, chats[0], 2, runtime) == pytest.approx(expected, rel=1e-3)
