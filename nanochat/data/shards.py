"""The data sets to pretrain on: shuffled text in numbered parquet shards on the Hugging Face Hub."""

import math
from dataclasses import dataclass

from nanochat import paths
from nanochat.data.downloads import MissingFilesError, fetch
from nanochat.data.manifest import HubFile
from nanochat.errors import UserError

SHARD_CHARS = 250_000_000
CHARS_PER_TOKEN = 4.8
"""of English prose under a vocabulary of 65,536"""
TOKENS_PER_PARAMETER = 20
SPARE = 1.1
"""Shards are not all as long; 10% more than needed keeps a run in its first epoch."""
SHARDS_STEP = 8


@dataclass(frozen=True)
class ShardedDataset:
    """Where a data set is and how much there is of it."""

    name: str
    repository: str
    num_shards: int
    """as published"""

    def shard_names(self, num_shards: int) -> list[str]:
        """The first shards. Raises UserError where that leaves nothing to train on, or there are not as many."""
        if not 2 <= num_shards <= self.num_shards:
            nearest = min(max(num_shards, 2), self.num_shards)
            raise UserError(
                f"--num-shards {num_shards} cannot be for {self.name} (the first shard is for validation): the nearest "
                f"that can is {nearest}"
            )
        return [f"shard_{i:05d}.parquet" for i in range(num_shards)]

    def fetch(self, num_shards: int, *, verify: bool = False) -> list[HubFile]:
        """Download the first `num_shards` shards, where they are missing or damaged. Raises UserError if it cannot."""
        names = self.shard_names(num_shards)
        try:
            # Token files take about as much room as the text does compressed.
            return fetch(self.repository, names, paths.data_dir(self.name), verify=verify, room=2.0)
        except MissingFilesError as error:
            there = len(set(self.shard_names(self.num_shards)) & set(error.present))
            raise UserError(
                f"{self.repository} has {there} shards, not {num_shards}: pass --num-shards {there}"
            ) from None


DATASETS = {
    dataset.name: dataset
    for dataset in (
        ShardedDataset("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", 1823),
        ShardedDataset("climbmix", "karpathy/climbmix-400b-shuffle", 6543),
    )
}


def shards_for_depth(depth: int, vocab_size: int) -> int:
    """How many shards a model of `depth` sees once in training, the one for validation included; 240 for d20."""
    from nanochat.model.gpt import GPTConfig  # brings torch, which the processes that tokenise need not load

    parameters = GPTConfig.from_depth(depth, vocab_size, 2048).num_parameters
    needed = SPARE * TOKENS_PER_PARAMETER * parameters * CHARS_PER_TOKEN / SHARD_CHARS
    return max(SHARDS_STEP, math.ceil(needed / SHARDS_STEP) * SHARDS_STEP)
