"""Prepare everything that training reads: text, tokenizer, token files, task data, identity conversations.

./prepare.sh --depth 20
./prepare.sh --dataset climbmix --num-shards 100
./prepare.sh --verify
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat import cli, paths
from nanochat.data.datasets import DATASETS, DatasetName, TextDataset, encyclopedia, shards_for_depth
from nanochat.data.token_files import TokenShards, write_shards
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tasks import identity, mixtures
from nanochat.tasks.mixtures import HUB_TASKS
from nanochat.tasks.spelling import write_words
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer
from nanochat.units import format_bytes, format_duration

MAX_CHARS_FOR_WORDS = 100_000_000


@dataclass
class PrepareOptions:
    """Prepare the text, the tokenizer and the token files. Existing files that are up to date are kept."""

    dataset: DatasetName = "fineweb-edu"
    """text to pretrain on; encyclopedia: five million characters, included in the installation"""
    depth: int = 20
    """depth of the model to train; sets how much text is downloaded"""
    num_shards: int | None = None
    """files of text, one of them for validation; default: as many as the depth needs, 240 for depth 20"""
    tasks: bool = True
    """also download the data of the later stages and of the evaluation"""
    verify: bool = False
    """verify the checksums of all files and download damaged ones again"""
    vocab_size: int = 65536
    """number of tokens, including the nine special ones"""
    max_chars: int = 2_000_000_000
    """maximum number of characters to train the tokenizer on"""
    fresh: bool = False
    """train a new tokenizer; the old one is set aside, and checkpoints trained with it do not work with the new one"""


DEMO = PrepareOptions(dataset="encyclopedia", vocab_size=4096, tasks=False)


def main(options: PrepareOptions) -> None:
    dataset = prepare_text(options)
    tokenizer = prepare_tokenizer(dataset, options)
    prepare_tokens(dataset, tokenizer)
    if options.tasks:
        prepare_tasks(dataset, options)
    if identity.write_default(paths.identity_file()):
        print(f"identity conversations: {paths.identity_file()} (edit them, or use ./view_identity_data.py)")
    print(f"data of the later stages: {mixtures.write_default()} (edit it, or pass --add to a stage)")


def prepare_text(options: PrepareOptions) -> TextDataset:
    """Download the text unless it is included in the installation."""
    if options.dataset == "encyclopedia":
        return encyclopedia()
    dataset = DATASETS[options.dataset]
    num_shards = options.num_shards
    if num_shards is None:
        num_shards = min(shards_for_depth(options.depth, options.vocab_size), dataset.num_shards)
    files = dataset.fetch(num_shards, verify=options.verify)
    size = format_bytes(sum(file.size for file in files))
    print(f"{options.dataset}: {len(files)} shards, {size}, all checksums verified")
    return dataset.open(files)


def prepare_tokenizer(dataset: TextDataset, options: PrepareOptions) -> Tokenizer:
    """Load the tokenizer, or train it if it is missing or with --fresh. Waits for a process that is training it."""
    folder = paths.tokenizer_dir()
    with folder_lock(paths.base_dir()):
        if folder.exists() and not options.fresh:
            tokenizer = Tokenizer.load(folder)
            if tokenizer.vocab_size != options.vocab_size:
                raise UserError(
                    f"--vocab-size must be {tokenizer.vocab_size} to use the tokenizer in {folder}, got "
                    f"{options.vocab_size}: pass --fresh to train a new one"
                )
            print(f"tokenizer: {tokenizer.vocab_size:,} tokens, in {folder}")
            if tokenizer.pattern != SPLIT_PATTERN:
                print(
                    "note: this tokenizer splits text differently from the current version, so its models are not "
                    "exported to GGUF (llama.cpp, Ollama); before you train a new model, pass --fresh"
                )
            return tokenizer
        start = time.perf_counter()
        tokenizer = Tokenizer.train(limit_chars(dataset.texts("train"), options.max_chars), options.vocab_size)
        if aside := tokenizer.save(folder):
            print(f"the previous tokenizer was moved to {aside}")
        print(f"tokenizer: {tokenizer.vocab_size:,} tokens, trained in {format_duration(time.perf_counter() - start)}")
        return tokenizer


def limit_chars(documents: Iterator[str], max_chars: int) -> Iterator[str]:
    """Yield the first `max_chars` characters."""
    for text in documents:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def prepare_tokens(dataset: TextDataset, tokenizer: Tokenizer) -> None:
    """Write the token files that are missing, or that come from other text or another tokenizer."""
    folder = paths.tokens_dir(dataset.name)
    start = time.perf_counter()
    workers = 1 if dataset.name == "encyclopedia" else None  # faster than starting processes
    if num_written := write_shards(folder, dataset.splits, tokenizer, workers):
        print(f"{dataset.name}: wrote {num_written} token files in {format_duration(time.perf_counter() - start)}")
    for split in dataset.splits:
        tokens = TokenShards.open(folder, split, tokenizer)
        print(
            f"{dataset.name} {split}: {tokens.num_documents:,} documents, {len(tokens.ids):,} tokens, "
            f"{tokens.num_bytes:,} bytes"
        )


def prepare_tasks(dataset: TextDataset, options: PrepareOptions) -> None:
    """Download the data of the later stages and of the evaluation, and list the words for the spelling tasks."""
    downloads = [task.fetch(split, verify=options.verify) for task in HUB_TASKS for split in task.FILES]
    sizes = [file.size for files in downloads for file in files]
    print(f"tasks: {len(sizes)} files, {format_bytes(sum(sizes))}, all checksums verified")
    num_words = write_words(paths.words_file(), limit_chars(dataset.texts("train"), MAX_CHARS_FOR_WORDS))
    print(f"words for the spelling tasks: {num_words:,}")


if __name__ == "__main__":
    cli.run(main, PrepareOptions, demo=DEMO)
