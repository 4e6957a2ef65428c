"""Reinforcement learning's batches: the model's own replies, weighted by how good they were.

Group Relative Policy Optimization (https://arxiv.org/abs/2402.03300) with what is not needed left out: on-policy,
so no ratio and no clipping; no reference model; the advantage is the reward minus its group's mean, not divided by
the deviation (Dr. GRPO, https://arxiv.org/abs/2503.20783); the loss is a mean over the step's tokens
(DAPO, https://arxiv.org/abs/2503.14476).
"""

import dataclasses

import numpy as np
import torch

from nanochat.data.batches import Batch, StepData, group_by_tokens, padded_length
from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.request import Completion
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model.loss import IGNORE
from nanochat.runtime import Runtime
from nanochat.tasks.task import GradedTask


class RolloutBatches:
    """Several replies to each of a step's problems; those of a group that are all as good teach nothing."""

    def __init__(
        self,
        chat: ChatModel,
        task: GradedTask,
        runtime: Runtime,
        *,
        problems_per_step: int,
        samples_per_problem: int,
        device_batch_size: int,
        sampling: SamplingParams,
    ) -> None:
        """`sampling.seed` is the run's: each reply's own seed follows from it, the step, problem and sample."""
        self.chat = chat
        self.task = task
        self.runtime = runtime
        self.problems_per_step = problems_per_step
        self.samples_per_problem = samples_per_problem
        self.device_batch_size = device_batch_size
        self.sampling = sampling

    def step_data(self, step: int) -> StepData:
        """Sample with the model as it is, grade, and keep the groups that have something to teach."""
        first = step * self.problems_per_step
        world = self.runtime.world
        mine = range(first + world.rank, first + self.problems_per_step, world.size)
        problems = [self.task[i % len(self.task)] for i in mine]
        prompts = [self.chat.prompt(self.task.prompt(problem)) for problem in problems]
        samplings = [
            dataclasses.replace(self.sampling, seed=(self.sampling.seed << 40) + i * self.samples_per_problem + sample)
            for i in mine
            for sample in range(self.samples_per_problem)
        ]
        engine = self.chat.engine
        engine.reset()  # the weights have changed since the last step
        completions = engine.generate(
            [prompt for prompt in prompts for _ in range(self.samples_per_problem)], samplings
        )
        engine.reset()  # the memory is wanted for training
        rewards = np.array(
            [
                self.task.grade(
                    problems[i // self.samples_per_problem], reply_parts(self.chat.tokenizer, completion.tokens)
                )
                for i, completion in enumerate(completions)
            ]
        ).reshape(len(problems), self.samples_per_problem)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)).ravel()
        teaching = np.flatnonzero(np.repeat(np.ptp(rewards, axis=1) > 0, self.samples_per_problem))
        # Rows of similar length share a micro-batch, so little of it is padding.
        rows = [(prompts[i // self.samples_per_problem], completions[i], advantages[i]) for i in teaching]
        rows.sort(key=lambda row: len(row[0]) + len(row[1].tokens))
        lengths = [len(prompt) + len(completion.tokens) - 1 for prompt, completion, _ in rows]
        cuts = group_by_tokens(lengths, self.device_batch_size * self.chat.context)
        batches = [self._batch(rows[cut]) for cut in cuts]
        reward, length, taught, count = self.runtime.world.sum(
            rewards.sum(), sum(len(c.tokens) for c in completions), len(teaching), len(completions)
        )
        return StepData(
            batches, {"reward": reward / count, "reply_tokens": length / count, "taught_share": taught / count}
        )

    def _batch(self, rows: list[tuple[list[int], Completion, float]]) -> Batch:
        """Prompts with their completions, padded; the targets are the tokens that the model drew itself.

        The end-of-turn token is one of them; a tool's output is not.
        """
        length = max(len(prompt) + len(completion.tokens) for prompt, completion, _ in rows) - 1
        length = min(padded_length(length), self.chat.context)
        tokens = torch.full((len(rows), length), self.chat.tokenizer.bos_id)
        targets = torch.full((len(rows), length), IGNORE)
        weights = torch.zeros(len(rows), length)
        for row, (prompt, completion, advantage) in enumerate(rows):
            ids = torch.tensor(prompt + completion.tokens)
            drawn = torch.tensor([False] * len(prompt) + completion.sampled)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(~drawn[1:], IGNORE)
            weights[row] = advantage
        return Batch(tokens, targets, weights)
