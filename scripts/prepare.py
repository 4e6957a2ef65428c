"""Everything that training needs on disk: tokenizer, token files, identity conversations.

./prepare.sh --demo
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nanochat import cli, paths
from nanochat.data.corpora import Corpus, Encyclopedia
from nanochat.data.token_files import TokenFile, write_documents
from nanochat.errors import UserError
from nanochat.tasks import identity
from nanochat.tokenizer import Tokenizer


@dataclass
class PrepareOptions:
    """Prepare the text, the tokenizer and the token files. What is there and current is not made again."""

    dataset: Literal["encyclopedia"] = "encyclopedia"
    """text to pretrain on"""
    vocab_size: int = 65536
    """tokens in the vocabulary, the nine special ones included"""
    max_chars: int = 2_000_000_000
    """characters of text that the tokenizer is trained on, at most"""
    fresh: bool = False
    """make the tokenizer again; checkpoints trained with the old one cannot be used with the new"""


DEMO = PrepareOptions(dataset="encyclopedia", vocab_size=4096)
CORPORA = {"encyclopedia": Encyclopedia}


def main(options: PrepareOptions) -> None:
    corpus = CORPORA[options.dataset]()
    tokenizer = prepare_tokenizer(corpus, options)
    for split in ("val", "train"):
        prepare_tokens(corpus, split, tokenizer)
    if identity.write_default(paths.identity_file()):
        print(f"identity conversations: {paths.identity_file()}, yours to edit (view_identity_data.py)")


def prepare_tokenizer(corpus: Corpus, options: PrepareOptions) -> Tokenizer:
    """The tokenizer that is there, or a new one."""
    folder = paths.tokenizer_dir()
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
    tokenizer = Tokenizer.train(limited(corpus.texts("train"), options.max_chars), options.vocab_size)
    tokenizer.save(folder)
    print(f"tokenizer: {tokenizer.vocab_size:,} tokens, trained in {time.perf_counter() - begun:.1f}s")
    return tokenizer


def limited(texts: Iterator[str], max_chars: int) -> Iterator[str]:
    """The first texts, `max_chars` characters in all."""
    for text in texts:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def prepare_tokens(corpus: Corpus, split: str, tokenizer: Tokenizer) -> None:
    """Write the token file of a split, if what is there was not made from this text by this tokenizer."""
    folder = paths.tokens_dir(corpus.name)
    if not TokenFile.is_current(folder, split, tokenizer, corpus.origin()):
        write_documents(folder, split, tokenizer, corpus.texts(split), corpus.origin())
    file = TokenFile.open(folder, split, tokenizer)
    print(f"{corpus.name} {split}: {len(file):,} documents, {len(file.ids):,} tokens, {file.num_bytes:,} bytes")


if __name__ == "__main__":
    cli.run(main, PrepareOptions, demo=DEMO)
