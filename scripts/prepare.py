"""Everything that training needs on disk: text, tokenizer, token files, identity conversations.

./prepare.sh --depth 20
./prepare.sh --dataset climbmix --num-shards 100
./prepare.sh --verify
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat import cli, paths
from nanochat.data.corpora import Corpus, Encyclopedia, HubShards, texts
from nanochat.data.shards import DATASETS, shards_for_depth
from nanochat.data.token_shards import TokenShards, write_shards
from nanochat.data.words import write_words
from nanochat.errors import UserError
from nanochat.locks import folder_lock
from nanochat.tasks import identity
from nanochat.tasks.mixtures import HUB_FILES
from nanochat.tokenizer import Tokenizer


@dataclass
class PrepareOptions:
    """Prepare the text, the tokenizer and the token files. What is there and current is not made again."""

    dataset: Literal["fineweb-edu", "climbmix", "encyclopedia"] = "fineweb-edu"
    """text to pretrain on; encyclopedia comes with the installation, five million characters"""
    depth: int = 20
    """the model that the text is for: decides how much of it is fetched"""
    num_shards: int | None = None
    """files of text, the one for validation included; by default what the depth needs, 240 for 20"""
    tasks: bool = True
    """fetch what the stages after pretraining and the evaluation need as well"""
    verify: bool = False
    """hash every file again and replace what is damaged"""
    vocab_size: int = 65536
    """tokens in the vocabulary, the nine special ones included"""
    max_chars: int = 2_000_000_000
    """characters of text that the tokenizer is trained on, at most"""
    fresh: bool = False
    """make the tokenizer again; checkpoints trained with the old one, which is kept, cannot be used with the new"""


DEMO = PrepareOptions(dataset="encyclopedia", vocab_size=4096, tasks=False)
SPLITS = ("val", "train")


def main(options: PrepareOptions) -> None:
    corpus = prepare_text(options)
    tokenizer = prepare_tokenizer(corpus, options)
    prepare_tokens(corpus, tokenizer)
    if options.tasks:
        prepare_tasks(corpus, options)
    if identity.write_default(paths.identity_file()):
        print(f"identity conversations: {paths.identity_file()}, yours to edit (view_identity_data.py)")


def prepare_text(options: PrepareOptions) -> Corpus:
    """Fetch the text, where it does not come with the installation."""
    if options.dataset == "encyclopedia":
        return Encyclopedia()
    num_shards = options.num_shards
    if num_shards is None:
        num_shards = min(shards_for_depth(options.depth, options.vocab_size), DATASETS[options.dataset].num_shards)
    files = DATASETS[options.dataset].fetch(num_shards, verify=options.verify)
    print(
        f"{options.dataset}: {len(files)} shards, {sum(file.size for file in files) / 1e9:.2f} GB, every sha256 right"
    )
    return HubShards(options.dataset, files)


def prepare_tokenizer(corpus: Corpus, options: PrepareOptions) -> Tokenizer:
    """The tokenizer that is there, or a new one. A second run waits for one that trains it."""
    with folder_lock(paths.base_dir()):
        return _prepare_tokenizer(corpus, options, paths.tokenizer_dir())


def _prepare_tokenizer(corpus: Corpus, options: PrepareOptions, folder: Path) -> Tokenizer:
    if folder.exists() and not options.fresh:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size != options.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, not {options.vocab_size}: "
                f"pass --vocab-size {tokenizer.vocab_size} to keep it, or --fresh to train a new one"
            )
        print(f"tokenizer: {tokenizer.vocab_size:,} tokens, in {folder}")
        return tokenizer
    begun = time.perf_counter()
    tokenizer = Tokenizer.train(limited(texts(corpus, "train"), options.max_chars), options.vocab_size)
    aside = tokenizer.save(folder)
    if aside:
        print(f"the tokenizer that was here is kept as {aside}")
    print(f"tokenizer: {tokenizer.vocab_size:,} tokens, trained in {time.perf_counter() - begun:.1f}s")
    return tokenizer


def limited(documents: Iterator[str], max_chars: int) -> Iterator[str]:
    """The first documents, `max_chars` characters in all."""
    for text in documents:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def prepare_tokens(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Write the token files that are missing, or were not made from this text by this tokenizer."""
    folder = paths.tokens_dir(corpus.name)
    begun = time.perf_counter()
    workers = 1 if corpus.name == "encyclopedia" else None  # it is done before other processes have started
    written = write_shards(folder, {split: corpus.shards(split) for split in SPLITS}, tokenizer, workers)
    if written:
        print(f"{corpus.name}: {written} token files made in {time.perf_counter() - begun:.1f}s")
    for split in SPLITS:
        tokens = TokenShards.open(folder, split, tokenizer)
        print(
            f"{corpus.name} {split}: {tokens.num_documents:,} documents, {len(tokens.ids):,} tokens, "
            f"{tokens.num_bytes:,} bytes"
        )


def prepare_tasks(corpus: Corpus, options: PrepareOptions) -> None:
    """Fetch the data sets of the stages after pretraining, and list the words to spell."""
    sizes = [file.size for files in HUB_FILES for file in files.fetch(verify=options.verify)]
    print(f"tasks: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB, every sha256 right")
    print(f"words to spell: {write_words(paths.words_file(), texts(corpus, 'train')):,}")


if __name__ == "__main__":
    cli.run(main, PrepareOptions, demo=DEMO)
