"""CORE against a scorer that calls the model once for each option, on the real tasks and on tiny ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import UserError
from nanochat.eval.core import Core, CoreTask, Kind, fingerprint, read_tasks, right_answers
from nanochat.eval.multiple_choice import OptionScore, Problem, score_options
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from tests.conftest import random_model

CHOICES: list[dict[str, Any]] = [
    {"query": f"Question {i}: what shines?", "choices": ["the sun", "the", "a stone by the sea", "sun"], "gold": i % 4}
    for i in range(9)
]
SCHEMAS: list[dict[str, Any]] = [
    {"context_options": [f"Tom {i} saw Ann because Tom", f"Tom {i} saw Ann because Ann"], "continuation": "was near.",
     "gold": i % 2}
    for i in range(7)
]  # fmt: skip
TEXTS: list[dict[str, Any]] = [{"context": f"The number after {i} is ", "continuation": str(i + 1)} for i in range(8)]
ROWS: dict[Kind, list[dict[str, Any]]] = {
    "multiple_choice": CHOICES, "schema": SCHEMAS, "language_modeling": TEXTS
}  # fmt: skip


def write_task(folder: Path, kind: Kind, shots: int = 2) -> CoreTask:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    return CoreTask(kind, kind, shots, " ", 0.25, path)


@pytest.fixture
def bundle() -> Path:
    shared = os.environ.get("NANOCHAT_SHARED")
    if not shared:
        pytest.skip("NANOCHAT_SHARED does not name the folder with the evaluation bundle")
    return Path(shared) / "hub" / "eval_bundle"


def brute_force(model: GPT, problem: Problem) -> list[OptionScore]:
    """Each option on its own, with all its logits."""
    scores = []
    for option in problem.options:
        with torch.no_grad():
            logits = model(torch.tensor([option.tokens]))[0]
        scored = range(option.start, len(option.tokens))
        losses = [F.cross_entropy(logits[at - 1], torch.tensor(option.tokens[at])).item() for at in scored]
        greedy = all(int(logits[at - 1].argmax()) == option.tokens[at] for at in scored)
        scores.append(OptionScore(sum(losses) / len(losses), greedy))
    return scores


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("batch_tokens", [1, 300, 10_000])
def test_a_batch_scores_as_one_option_at_a_time(
    tmp_path: Path, tokenizer: Tokenizer, kind: Kind, batch_tokens: int
) -> None:
    task, model = write_task(tmp_path, kind), random_model(tokenizer.vocab_size, sequence_len=256)
    problems = [task.problem(i, tokenizer, 256) for i in range(len(task.rows))]
    for problem, scores in zip(problems, score_options(model, problems, batch_tokens), strict=True):
        for score, expected in zip(scores, brute_force(model, problem), strict=True):
            assert score.mean_loss == pytest.approx(expected.mean_loss, rel=1e-4)
            assert score.is_greedy == expected.is_greedy


def test_a_text_that_the_model_would_write_is_right(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The greedy continuation of a random model counts as correct, any other one does not."""
    model = random_model(tokenizer.vocab_size, sequence_len=256)
    model.embed_tokens.weight.data.copy_(model.lm_head.weight.data * 20)  # it then repeats its last token
    path = tmp_path / "repeat.jsonl"
    path.write_text("\n".join(json.dumps({"context": "a-b", "continuation": text}) for text in ("bbb", "bab", "b")))
    task = CoreTask("repeat", "language_modeling", 0, "", 0.0, path)
    right = right_answers(model, tokenizer, task, 1000)
    expected = []
    for row in task.rows:
        asked = [tokenizer.bos_id, *tokenizer.encode("a-b")]
        wanted = [tokenizer.bos_id, *tokenizer.encode("a-b" + row["continuation"])][len(asked) :]
        for _ in wanted:
            asked.append(int(model(torch.tensor([asked]))[0, -1].argmax()))
        expected.append(asked[-len(wanted) :] == wanted)
    assert right == expected and len(set(right)) == 2


def test_a_long_prompt_loses_its_beginning_and_the_options_still_begin_alike(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    task = write_task(tmp_path, "multiple_choice", shots=5)
    whole, cut = task.problem(0, tokenizer, 1000), task.problem(0, tokenizer, 40)
    lost = max(len(option.tokens) for option in whole.options) - 40
    assert lost > 0
    for option, shorter in zip(whole.options, cut.options, strict=True):
        assert shorter.tokens == option.tokens[lost:]
        assert shorter.tokens[shorter.start :] == option.tokens[option.start :]
    model = random_model(tokenizer.vocab_size, sequence_len=40)
    (scores,) = score_options(model, [cut], 1000)
    assert [s.mean_loss for s in scores] == pytest.approx([s.mean_loss for s in brute_force(model, cut)], rel=1e-4)


def test_examples_are_always_the_same_and_never_the_problem_itself(tmp_path: Path) -> None:
    task = write_task(tmp_path, "language_modeling", shots=7)
    for i in range(len(task.rows)):
        assert task.examples(i) == task.examples(i)
        assert task.rows[i] not in task.examples(i) and len(task.examples(i)) == 7
    assert task.examples(0) != task.examples(1)
    assert sorted(row["context"] for row in task.rows) == sorted(row["context"] for row in TEXTS)


def test_how_problems_are_written(tmp_path: Path) -> None:
    task = write_task(tmp_path, "multiple_choice", shots=1)
    (example,), row = task.examples(0), task.rows[0]
    before = f"{example['query']} {example['choices'][example['gold']]}\n\n{row['query']} "
    assert task.texts(0) == [(before, before + choice) for choice in row["choices"]]
    task = write_task(tmp_path, "schema", shots=0)
    row = task.rows[0]
    assert task.texts(0)[1] == (f"{row['context_options'][1]} ", f"{row['context_options'][1]} was near.")
    task = write_task(tmp_path, "language_modeling", shots=0)
    number = int(task.rows[0]["continuation"])
    assert task.texts(0) == [(f"The number after {number - 1} is", f"The number after {number - 1} is {number}")]


def test_the_bundle_has_22_tasks_and_each_scores_as_one_at_a_time(bundle: Path, tokenizer: Tokenizer) -> None:
    model, context, count = random_model(tokenizer.vocab_size, sequence_len=256), 256, 3
    core = Core(bundle, count)
    tasks = core.tasks
    assert len(tasks) == 22
    chat = ChatModel("base", Engine(model, tokenizer))
    for task, score in zip(tasks, core.evaluate(chat, 2000, lambda task: None).scores, strict=True):
        expected = 0
        for problem in (task.problem(i, tokenizer, context) for i in range(count)):
            options = brute_force(model, problem)
            losses = [option.mean_loss for option in options]
            expected += options[0].is_greedy if len(options) == 1 else losses.index(min(losses)) == problem.gold
        assert (score.task, score.problems, score.accuracy) == (task.name, count, expected / count)
    assert {task.name: task.baseline for task in tasks}["boolq"] == 0.62
    assert {task.name: task.delimiter for task in tasks}["piqa"] == "\nAnswer: "


def test_another_bundle_has_another_fingerprint(tmp_path: Path) -> None:
    write_task(tmp_path, "schema").path.parent.joinpath("eval_data").mkdir()
    (tmp_path / "eval_data" / "x.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n- {label: x, dataset_uri: x.jsonl, num_fewshot: [0], icl_task_type: language_modeling}\n"
    )
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nx,0\n")
    before = fingerprint(tmp_path)
    (tmp_path / "eval_data" / "x.jsonl").write_text('{"context": "a", "continuation": "c"}\n')
    assert fingerprint(tmp_path) != before


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--eval-bundle"):
        read_tasks(tmp_path)
