"""MB/s of text converted into token files, with one process and with several, and of tiktoken alone.

python -m benchmarks.token_files --dataset fineweb-edu --workers 2
"""

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanochat import cli, paths
from nanochat.data.datasets import read_texts
from nanochat.data.token_files import TextShard, TokenShards, write_shards
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer


@dataclass
class BenchmarkOptions:
    """Time the tokenization of shards downloaded by ./prepare.sh, with its tokenizer."""

    dataset: str = "fineweb-edu"
    """name of the dataset"""
    num_shards: int = 8
    """maximum number of shards"""
    repeats: int = 4
    """times that each shard is used"""
    workers: int | None = None
    """processes; by default one per core"""


def main(options: BenchmarkOptions) -> None:
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    files = sorted(paths.data_dir(options.dataset).glob("shard_*.parquet"))[: options.num_shards]
    if not files:
        raise UserError(f"there are no shards in {paths.data_dir(options.dataset)}: run ./prepare.sh first")
    shards = [
        TextShard(f"{path.stem}-{repeat}", str(path), partial(read_texts, path))
        for path in files
        for repeat in range(options.repeats)
    ]

    texts = list(shards[0].texts())
    start = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    size = sum(len(text.encode()) for text in texts)
    print(f"tiktoken alone, one core: {size / (time.perf_counter() - start) / 1e6:.1f} MB/s")

    max_workers = options.workers or os.cpu_count() or 1
    for workers in sorted({1, max_workers}):
        with tempfile.TemporaryDirectory() as folder:
            cpu, start = cpu_seconds(), time.perf_counter()
            write_shards(Path(folder), {"train": shards}, tokenizer, workers)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
            size = TokenShards.open(Path(folder), "train", tokenizer).num_bytes
        print(
            f"{workers} processes: {size / 1e6:.0f} MB of text in {seconds:.1f}s, {size / seconds / 1e6:.1f} MB/s "
            f"({size / cpu / 1e6:.1f} MB per CPU second)"
        )


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
