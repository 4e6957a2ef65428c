"""A trained model's base directory, its export, and a hub to send it to."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nanochat import paths
from nanochat.hub.card import Publisher
from nanochat.hub.export import export
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint
from nanochat.train.checkpoint import Checkpoint
from tests.conftest import random_model
from tests.hub.fake_hub import FakeHub

ADA = Publisher("ada", "Ada Example", "mit")


def save_model(
    tokenizer: Tokenizer, source: str = "sft", tag: str = "d2", parent: Checkpoint | None = None
) -> Checkpoint:
    """A checkpoint with random weights in the base directory, and the tokenizer."""
    tokenizer.save(paths.tokenizer_dir())
    model = random_model(vocab_size=576)
    meta = {
        "source": source,
        "tag": tag,
        "num_iterations": 7,
        "trained_on": "encyclopedia, 7 tokens"
        if source == "base"
        else f"{source}:\n  gsm8k: 1  # 7\n  /home/ada/own.jsonl: 2",
        "tokenizer": tokenizer.hash,
        "model_config": vars(model.config),
        "num_parameters": model.config.num_parameters,
        "options": {"dataset": "encyclopedia"} if source == "base" else {"add": ["/home/ada/own.jsonl:2"]},
        "parent": {key: parent.meta[key] for key in ("source", "tag", "step", "saved_at")} if parent else None,
        "data": None,
        "seconds": 60.0,
        "results": {},
        "machine": "a machine",
        "software": "some software",
        "peak_memory": 1,
        "commit": "unknown",
    }
    return checkpoint.write(paths.checkpoints_dir(source) / tag, 7, model.state_dict(), {}, meta)


@pytest.fixture(scope="session")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made by hf_prepare.sh from a model with random weights; not to be changed."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        output = tmp_path_factory.mktemp("hf models")
        return export(save_model(tokenizer), ADA, output, torch.device("cpu"), print, gguf=["q8_0"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that replaces the real one in this process, logged in to as ada; retries do not wait."""
    with FakeHub() as hub:
        hub.replace_the_real_one(monkeypatch, first_pause=0.001)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub
