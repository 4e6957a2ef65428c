from pathlib import Path

import pytest
import tiktoken

from nanochat import paths
from nanochat.tokenizer import Tokenizer
from scripts import tok_eval
from scripts.tok_eval import TokEvalOptions, bytes_per_token, load_texts


def test_bytes_are_counted_not_characters() -> None:
    assert bytes_per_token(list, "日本") == 3.0  # type: ignore[arg-type]  # a token a character


def test_the_samples_are_of_four_kinds_and_ours_compresses_prose_best(tokenizer: Tokenizer) -> None:
    ratios = {kind: bytes_per_token(tokenizer.encode, text) for kind, text in load_texts().items()}
    assert list(ratios) == ["prose", "code", "numbers", "other scripts"]
    assert max(ratios, key=lambda kind: ratios[kind]) == "prose"


def test_where_nothing_can_be_loaded_it_says_so_and_shows_ours(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    tokenizer.save(paths.tokenizer_dir())
    own = base_dir / "own.txt"
    own.write_text("aaa")
    tok_eval.main(TokEvalOptions(own))
    out = capsys.readouterr().out
    assert "ours (512)" in out and "own.txt" in out
    assert "GPT-2" in out and "GPT-4" in out and out.count("ConnectionError") == 2
