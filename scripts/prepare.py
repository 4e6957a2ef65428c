"""Prepare everything that training reads: text, tokenizer, token files, tasks and identity conversations.

./prepare.sh --depth 20
./prepare.sh --depth 4 --dataset ./mybooks
./prepare.sh --dataset fineweb-edu:0.7 ./mybooks:0.3 --license cc-by-4.0
./prepare.sh --num-shards 100
./prepare.sh --verify
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from nanochat import cli, paths
from nanochat.atomic import atomic_write
from nanochat.data.amount import fit
from nanochat.data.sources import DATASETS, RECORD_FILE, shares
from nanochat.data.texts import ONE_PROCESS_CHARS, Text, TextOptions, open_texts
from nanochat.data.token_files import TokenShards
from nanochat.data.token_writer import write_shards
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tasks import identity, mixtures
from nanochat.tasks.mixtures import HUB_TASKS
from nanochat.tasks.spelling import write_words
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer
from nanochat.units import format_bytes, format_duration, format_table
from nanochat.untrusted import check_types, read_json, reading

MAX_CHARS_FOR_WORDS = 100_000_000
CHARS_PER_VOCABULARY_ENTRY = 1000  # with less text, rare words become tokens that are hardly ever trained
TRAINED_ON_FILE = "trained_on.json"  # next to the tokenizer


@dataclass
class PrepareOptions(TextOptions):
    """Prepare the text, the tokenizer and the token files. Existing files that are up to date are kept."""

    tasks: bool = True
    """also download the data of the later stages and of the evaluation"""
    max_chars: int = 2_000_000_000
    """maximum number of characters to train the tokenizer on"""
    keep_tokenizer: bool = False
    """keep a tokenizer that was trained on other text, and with it the models that use it"""
    fresh: bool = False
    """train a new tokenizer; the old one is set aside, and checkpoints trained with it do not work with the new one"""


DEMO = PrepareOptions(dataset=("encyclopedia",), depth=4, vocab_size=4096, tasks=False)


def main(options: PrepareOptions) -> None:
    texts = open_texts(options)
    tokenizer = prepare_tokenizer(texts, options)
    for text in texts:
        prepare_tokens(text, tokenizer)
    summarize(texts, tokenizer, options.depth)
    if options.tasks:
        prepare_tasks(texts, options)
    if identity.write_default(paths.identity_file()):
        print(f"identity conversations: {paths.identity_file()} (edit them, or use ./view_identity_data.py)")
    print(f"data of the later stages: {mixtures.write_default()} (edit it, or pass --add to a stage)")


def prepare_tokenizer(texts: Sequence[Text], options: PrepareOptions) -> Tokenizer:
    """Load the tokenizer, or train it if it is missing or with --fresh. Waits for a process that is training it."""
    folder, wanted = paths.tokenizer_dir(), [str(text.source) for text in texts]
    with folder_lock(paths.base_dir()):
        if folder.exists() and not options.fresh:
            tokenizer = Tokenizer.load(folder)
            check_tokenizer(tokenizer, wanted, options)
            print(f"tokenizer: {tokenizer.vocab_size:,} tokens, in {folder}")
            if tokenizer.pattern != SPLIT_PATTERN:
                print(
                    "note: this tokenizer splits text differently from the current version, so its models are not "
                    "exported to GGUF (llama.cpp, Ollama); before you train a new model, pass --fresh"
                )
            return tokenizer
        start, num_chars = time.perf_counter(), sum(text.num_chars for text in texts)
        fitting = max(512, 2 ** int(math.log2(num_chars / CHARS_PER_VOCABULARY_ENTRY + 1)))
        if fitting < options.vocab_size:
            print(f"note: {num_chars:,.0f} characters are few for --vocab-size {options.vocab_size}: try {fitting}")
        tokenizer = Tokenizer.train(mixed_text(texts, options.max_chars), options.vocab_size)
        if aside := tokenizer.save(folder):
            print(f"the previous tokenizer was moved to {aside}")
        with atomic_write(folder / TRAINED_ON_FILE) as file:
            json.dump({"dataset": wanted, "vocab_size": options.vocab_size}, file)
        print(f"tokenizer: {tokenizer.vocab_size:,} tokens, trained in {format_duration(time.perf_counter() - start)}")
        return tokenizer


def check_tokenizer(tokenizer: Tokenizer, wanted: Sequence[str], options: PrepareOptions) -> None:
    """Raise UserError if the existing tokenizer is not the one that `options` would train, unless it is to be kept."""
    if options.keep_tokenizer:
        return
    folder = paths.tokenizer_dir()
    known = all(name in DATASETS for name in wanted)
    trained_on: dict[str, Any] = {"dataset": wanted if known else ["other text"], "vocab_size": tokenizer.vocab_size}
    if (folder / TRAINED_ON_FILE).exists():  # not if trained by an earlier version
        with reading(folder / TRAINED_ON_FILE, "pass --keep-tokenizer to use the tokenizer, or --fresh"):
            trained_on = read_json(folder / TRAINED_ON_FILE)
            check_types(trained_on, {"dataset": list, "vocab_size": int})
    if trained_on["dataset"] != wanted:
        raise UserError(
            f"the tokenizer in {folder} was trained on {' '.join(trained_on['dataset'])}: pass --keep-tokenizer to use "
            "it for this text too, or --fresh to train a new one"
        )
    if trained_on["vocab_size"] != options.vocab_size:
        raise UserError(
            f"--vocab-size must be {trained_on['vocab_size']} to use the tokenizer in {folder}, got "
            f"{options.vocab_size}: pass --fresh to train a new one"
        )


def mixed_text(texts: Sequence[Text], max_chars: int) -> Iterator[str]:
    """Yield the training text of all sources by weight, at most `max_chars` characters."""
    if len(texts) == 1:
        return limit_chars(texts[0].read("train"), max_chars)
    sizes = [text.num_chars for text in texts]
    by_weight = shares([text.source for text in texts], sizes)
    total = min(max_chars, max(size / share for size, share in zip(sizes, by_weight, strict=True)))
    return chain.from_iterable(
        limit_chars(chain.from_iterable(text.read("train") for text in repeat(text)), round(total * share))
        for text, share in zip(texts, by_weight, strict=True)
    )


def limit_chars(documents: Iterator[str], max_chars: int) -> Iterator[str]:
    """Yield the first `max_chars` characters."""
    for text in documents:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def prepare_tokens(text: Text, tokenizer: Tokenizer) -> None:
    """Write the token files that are missing, or that come from other text or another tokenizer."""
    name, folder = text.source.name, paths.tokens_dir(text.source.folder)
    start = time.perf_counter()
    workers = 1 if text.num_chars < ONE_PROCESS_CHARS else None
    if num_written := write_shards(folder, text.splits, tokenizer, workers, remove_others=text.record is not None):
        print(f"{name}: wrote {num_written} token files in {format_duration(time.perf_counter() - start)}")
    if text.record is not None:
        with atomic_write(folder / RECORD_FILE) as file:
            file.write(json.dumps(text.record, indent=2) + "\n")


def summarize(texts: Sequence[Text], tokenizer: Tokenizer, depth: int) -> None:
    """Print a table of the sources, and a note if they are too little text for `depth`."""
    rows: list[tuple[str, ...]] = [
        ("source", "documents", "held out", "characters", "tokens", "bytes/token", "share", "scripts")
    ]
    opened = [
        [TokenShards.open(paths.tokens_dir(text.source.folder), split, tokenizer) for split in ("train", "val")]
        for text in texts
    ]
    by_weight = shares([text.source for text in texts], [len(train.ids) for train, _ in opened])
    for text, (train, val), share in zip(texts, opened, by_weight, strict=True):
        letters = Counter(train.counts)
        numbers = (train.num_documents, val.num_documents, letters.pop("characters", 0), len(train.ids))
        common = [(name.lower(), round(100 * count / letters.total())) for name, count in letters.most_common(4)]
        scripts = ", ".join(f"{name} {percent}%" for name, percent in common if percent)
        compression = f"{train.num_bytes / len(train.ids):.2f}"
        rows.append((text.source.name, *(f"{n:,}" for n in numbers), compression, f"{share:.1%}", scripts))
    print(format_table(rows))
    if [text.source.name for text in texts] == ["encyclopedia"]:  # the demo's, which is known to be small
        return
    usable = min(len(train.ids) / share for (train, _), share in zip(opened, by_weight, strict=True))
    if note := fit(usable, depth, tokenizer.vocab_size):
        print(f"note: {note}")


def prepare_tasks(texts: Sequence[Text], options: PrepareOptions) -> None:
    """Download the data of the later stages and of the evaluation, and list the words for the spelling tasks."""
    downloads = [task.fetch(split, verify=options.verify) for task in HUB_TASKS for split in task.FILES]
    sizes = [file.size for files in downloads for file in files]
    print(f"tasks: {len(sizes)} files, {format_bytes(sum(sizes))}, all checksums verified")
    num_words = write_words(paths.words_file(), mixed_text(texts, MAX_CHARS_FOR_WORDS))
    print(f"words for the spelling tasks: {num_words:,}")


if __name__ == "__main__":
    cli.run(main, PrepareOptions, demo=DEMO)
