"""Small real parts for the tests: a tokenizer trained on the embedded text, models of two layers."""

from pathlib import Path

import pytest
import torch

from nanochat.data import embedded
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 512, trained on 300 articles."""
    return Tokenizer.train(embedded.documents("train")[:300], vocab_size=512)


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory of the test's own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def random_model(vocab_size: int = 512, depth: int = 2, sequence_len: int = 64, **shape: int) -> GPT:
    """A model whose every matrix is random, the head and the residual projections too."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(depth, vocab_size, sequence_len)
    model = GPT(GPTConfig(**{**vars(config), **shape}))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return model
