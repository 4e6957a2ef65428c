"""RL's batches train on what the model drew, weighted by how it compared, and on nothing else."""

import pytest
import torch

from nanochat.conversations import Conversation, conversation
from nanochat.dist import World
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Completion
from nanochat.model.loss import IGNORE
from nanochat.runtime import Runtime
from nanochat.tasks.task import GradedTask
from nanochat.tokenizer import Tokenizer
from nanochat.train.grpo import RolloutBatches
from tests.conftest import random_model
from tests.training import EvenLength


def source(tokenizer: Tokenizer, task: GradedTask, world: World = World()) -> RolloutBatches:  # noqa: B008  # frozen
    model = random_model(tokenizer.vocab_size, sequence_len=96)
    return RolloutBatches(
        ChatModel("rl", Engine(model, tokenizer)),
        task,
        Runtime(torch.device("cpu"), torch.float32, world),
        problems_per_step=4,
        samples_per_problem=4,
        device_batch_size=5,
        sampling=SamplingParams(max_tokens=12, top_k=None, seed=3),
    )


def test_advantages_are_rewards_minus_their_group_s_mean(tokenizer: Tokenizer) -> None:
    data = source(tokenizer, EvenLength()).step_data(0)
    assert 0 < data.metrics["reward"] < 1 and data.batches
    weights = [row[0].item() for batch in data.batches if batch.weights is not None for row in batch.weights]
    assert sum(weights) == pytest.approx(0, abs=1e-5) and any(w > 0 for w in weights) and any(w < 0 for w in weights)
    assert all(batch.tokens.numel() <= 5 * 96 for batch in data.batches)


def test_groups_of_equal_rewards_are_left_out(tokenizer: Tokenizer) -> None:
    data = source(tokenizer, EvenLength((1.0, 1.0))).step_data(0)
    assert data.batches == [] and data.metrics["reward"] == 1 and data.metrics["useful_share"] == 0


def test_a_step_can_be_repeated_and_steps_differ(tokenizer: Tokenizer) -> None:
    first, again, other = (source(tokenizer, EvenLength()).step_data(step) for step in (0, 0, 1))
    for a, b in zip(first.batches, again.batches, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert not torch.equal(first.batches[0].tokens, other.batches[0].tokens)


def test_what_was_drawn_is_trained_on_and_what_was_forced_is_not(tokenizer: Tokenizer) -> None:
    end = tokenizer.special("<|assistant_end|>")
    completion = Completion([10, 11, 12, 13, end], [True, True, False, False, True], "stop")
    batch = source(tokenizer, EvenLength())._batch([([1, 2, 3], completion, 0.5)])
    assert batch.tokens[0, :7].tolist() == [1, 2, 3, 10, 11, 12, 13]
    assert batch.targets[0, :7].tolist() == [IGNORE, IGNORE, 10, 11, IGNORE, IGNORE, end]
    assert (batch.targets[0, 7:] == IGNORE).all() and batch.weights is not None
    assert batch.weights[0, 2] == 0.5


def test_rows_of_like_length_share_a_batch(tokenizer: Tokenizer) -> None:
    class LongAndShort(EvenLength):
        def __getitem__(self, index: int) -> Conversation:
            return conversation("Say " * (40 if index % 2 else 1), "ok")

    batches = source(tokenizer, LongAndShort())
    batches.device_batch_size = 1
    lengths = [len(row) for batch in batches.step_data(0).batches for row in batch.tokens]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_processes_share_the_problems(tokenizer: Tokenizer) -> None:
    # 16 replies in all; each process samples 8, with the seeds it would have had alone
    metrics = source(tokenizer, EvenLength()).step_data(0).metrics["reward"]
    halves = []
    for rank in range(2):
        part = source(tokenizer, EvenLength(), World(rank, 2))
        part.runtime = Runtime(torch.device("cpu"), torch.float32, _Alone(rank, 2))
        halves.append(part.step_data(0).metrics["reward"])
    assert sum(halves) / 2 == pytest.approx(metrics)


class _Alone(World):
    """One of two ranks whose sums are its own, so that one process can play both."""

    def sum(self, *numbers: float) -> list[float]:
        return list(numbers)


def test_the_samples_of_a_problem_read_its_prompt_once(tokenizer: Tokenizer) -> None:
    batches = source(tokenizer, EvenLength())
    batches.step_data(0)
    stats = batches.chat.engine.stats()
    prompts = [len(batches.chat.prompt(batches.task[i]["messages"][:-1])) for i in range(4)]
    assert stats.prompt_tokens == 4 * sum(prompts)
    assert stats.prefilled_tokens <= sum(prompts) + 12  # of 12 copies, the last token: its logits are needed
    assert stats.kv_bytes == 0  # the memory is training's again
