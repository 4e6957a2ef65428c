"""MB/s of text converted into token files, with one process and with several, and of tiktoken alone.

python -m benchmarks.token_files --dataset fineweb-edu --workers 2
python -m benchmarks.token_files --files mybooks/*.jsonl
"""

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanochat import cli, paths
from nanochat.data import documents
from nanochat.data.progress import in_processes
from nanochat.data.token_files import TokenShards
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer


@dataclass
class BenchmarkOptions:
    """Time the reading and tokenization of files, with the tokenizer that ./prepare.sh made."""

    dataset: str = "fineweb-edu"
    """use the shards of this dataset, downloaded by ./prepare.sh"""
    files: tuple[Path, ...] = ()
    """or these files"""
    num_shards: int = 8
    """maximum number of shards"""
    repeats: int = 4
    """times that each file is used"""
    workers: int | None = None
    """processes; by default one per core"""


def main(options: BenchmarkOptions) -> None:
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    files = [path.resolve() for path in options.files]
    if not files:
        files = sorted(paths.data_dir(options.dataset).glob("shard_*.parquet"))[: options.num_shards]
    if not files:
        raise UserError(f"there are no shards in {paths.data_dir(options.dataset)}: run ./prepare.sh first")
    parts = documents.find_parts(files[0].parent, files, ["text"]) * options.repeats
    shards = [TextShard(str(i), part.name, partial(documents.read, part)) for i, part in enumerate(parts)]

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
            in_processes("reading", documents.scan, parts, workers)
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
