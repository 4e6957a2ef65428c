"""Batches for reinforcement learning: the model's own replies, weighted by their advantage.

Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300), simplified: on-policy, without ratio or
clipping; no reference model; the advantage is the reward minus the mean of its group, not divided by the deviation
(Dr. GRPO, https://arxiv.org/abs/2503.20783); the loss is a mean over the step's tokens (DAPO,
https://arxiv.org/abs/2503.14476).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochat.data.batches import Batch, StepData
from nanochat.data.packing import group_by_tokens, padded_length
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.inference.scheduler import Completion
from nanochat.model.loss import IGNORE
from nanochat.runtime import Runtime
from nanochat.tasks.task import Task, score


@dataclass
class RolloutBatches:
    """Samples a group of replies per problem; groups in which all rewards are equal are dropped."""

    chat: ChatModel
    task: Task
    runtime: Runtime
    problems_per_step: int
    samples_per_problem: int
    device_batch_size: int
    sampling: SamplingParams  # each reply's seed is derived from its seed, the step, the problem and the sample

    def step_data(self, step: int) -> StepData:
        """Sample replies with the current weights, grade them, and batch those with a nonzero advantage."""
        group, world = self.samples_per_problem, self.runtime.world
        first = step * self.problems_per_step
        own = range(first + world.rank, first + self.problems_per_step, world.size)
        problems = [self.task.locate(i % len(self.task)) for i in own]
        room = self.sampling.max_tokens
        prompts = [self.chat.prompt(row["messages"][:-1], room) for _, row in problems for _ in range(group)]
        base_seed = self.sampling.seed << 40
        samplings = [replace(self.sampling, seed=base_seed + i * group + n) for i in own for n in range(group)]
        engine = self.chat.engine
        engine.reset()  # the weights have changed since the last step
        completions = engine.generate(prompts, samplings)
        engine.reset()  # training needs the memory
        replies = [reply_parts(self.chat.tokenizer, completion.tokens) for completion in completions]
        grades = [score(*problems[i // group], reply) for i, reply in enumerate(replies)]
        rewards = np.array(grades).reshape(len(problems), group)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)).ravel()
        useful = np.flatnonzero(np.repeat(np.ptp(rewards, axis=1) > 0, group))
        rows = [(prompts[i], completions[i], advantages[i]) for i in useful]
        rows.sort(key=lambda row: len(row[0]) + len(row[1].tokens))  # similar lengths share a batch: less padding
        lengths = [len(prompt) + len(completion.tokens) - 1 for prompt, completion, _ in rows]
        groups = group_by_tokens(lengths, self.device_batch_size * self.chat.context)
        reward, reply_tokens, num_useful, count = world.sum(
            rewards.sum(), sum(len(completion.tokens) for completion in completions), len(useful), len(completions)
        )
        metrics = {"reward": reward / count, "reply_tokens": reply_tokens / count, "useful_share": num_useful / count}
        return StepData([self._batch(rows[part]) for part in groups], metrics)

    def _batch(self, rows: list[tuple[list[int], Completion, float]]) -> Batch:
        """Prompts with their replies, padded. Targets are the sampled tokens, including end of turn, no tool output."""
        length = max(len(prompt) + len(completion.tokens) for prompt, completion, _ in rows) - 1
        length = min(padded_length(length), self.chat.context)
        tokens = torch.full((len(rows), length), self.chat.tokenizer.bos_id)
        targets = torch.full((len(rows), length), IGNORE)
        weights = torch.zeros(len(rows), length)
        for row, (prompt, completion, advantage) in enumerate(rows):
            ids = torch.tensor(prompt + completion.tokens)
            sampled = torch.tensor([False] * len(prompt) + completion.sampled)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(~sampled[1:], IGNORE)
            weights[row] = advantage
        return Batch(tokens, targets, weights)
