"""Rows use every token of every document, and mark where documents start."""

from pathlib import Path

import numpy as np
import pytest

from nanochat.data.batches import StreamRows
from nanochat.data.packing import PackedRows, best_fit
from nanochat.data.token_files import TokenFile
from nanochat.data.token_writer import write_documents
from nanochat.model.loss import IGNORE
from nanochat.tokenizer import Tokenizer

BOS = 99


def token_file(documents: list[list[int]], masks: list[list[int]] | None = None) -> TokenFile:
    ids = np.array([token for document in documents for token in document], np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    mask = np.array([m for mask in masks for m in mask], np.uint8) if masks else None
    return TokenFile(ids, offsets, mask, 0)


def random_documents(longest: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[BOS, *rng.integers(0, 90, rng.integers(1, longest)).tolist()] for _ in range(60)]


@pytest.mark.parametrize("sequence_len", [16, 33])
def test_a_stream_predicts_every_token_once_from_what_came_before(sequence_len: int) -> None:
    file = token_file(random_documents(40))
    rows = StreamRows(file, sequence_len, BOS)
    predicted = []
    for index in range(len(rows)):
        tokens, targets = rows[index]
        assert tokens[0] == BOS and len(tokens) == len(targets) == sequence_len
        # inside a row each input is the target before it, unless that was a row-opening bos
        assert all(tokens[i + 1] == targets[i] for i in range(sequence_len - 1) if targets[i] != IGNORE)
        (first,) = file.ids[index * sequence_len :][:1]
        predicted += ([BOS] if first == BOS else []) + [t for t in targets.tolist() if t != IGNORE]
    assert predicted == file.ids[:].tolist()


@pytest.mark.parametrize("per_row", [None, 1])
def test_packing_predicts_every_token_that_fits_once_and_counts_the_others(per_row: int | None) -> None:
    documents = random_documents(70)
    rows = PackedRows(token_file(documents), 32, BOS, learn_all=True, documents_per_row=per_row)
    predicted: list[int] = []
    for index in range(len(rows)):
        tokens, targets = rows[index]
        assert len(tokens) == len(targets) == 32
        if per_row == 1:
            assert len(rows.rows[index]) == 1
        predicted += [t for t in targets.tolist() if t != IGNORE]
    assert sorted(predicted) == sorted(t for document in documents for t in document[1:32])
    assert rows.num_cut == sum(len(document) > 32 for document in documents) > 0
    assert rows.tokens_lost == sum(len(document[32:]) for document in documents)


def test_packing_learns_only_what_the_mask_says_and_never_across_documents() -> None:
    file = token_file([[BOS, 1, 2, 3], [BOS, 4, 5]], [[0, 0, 1, 1], [0, 0, 1]])
    tokens, targets = PackedRows(file, 8, BOS, learn_all=False)[0]
    assert tokens.tolist() == [BOS, 1, 2, 3, BOS, 4, 5, BOS]
    assert targets.tolist() == [IGNORE, 2, 3, IGNORE, IGNORE, 5, IGNORE, IGNORE]


def test_best_fit_fills_rows() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 2000).tolist()
    rows = best_fit(list(range(2000)), lengths, 64)
    assert sorted(start for row in rows for start, _ in row) == list(range(2000))
    assert max(sum(length for _, length in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.99
    assert best_fit([0, 1], [5, 5], 64, max_per_row=1) == [[(0, 5)], [(1, 5)]]


def test_rows_of_a_real_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_documents(tmp_path, "train", tokenizer, ["One text.", "Another text, longer."], "here")
    file = TokenFile.open(tmp_path, "train", tokenizer)
    assert len(file) == 2 and file.num_bytes == len("One text.Another text, longer.")
    row = StreamRows(file, 64, tokenizer.bos_id)[0]
    assert tokenizer.decode(row.targets[row.targets != IGNORE].tolist()) == "One text.<|bos|>Another text, longer."
