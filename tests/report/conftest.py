"""A base model of 24 steps and a midtrained one of 3 that grew from it, really trained, on rows of random tokens."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint, resume
from nanochat.train.loop import train
from nanochat.train.run import Evaluation, TrainingRun
from tests.training import HOW, OPTIONS, FewRows, batches, begin


@pytest.fixture
def runtime(base_dir: Path) -> Iterator[Runtime]:
    with Runtime.start("cpu") as runtime:
        yield runtime


def train_mid(runtime: Runtime, tokenizer: Tokenizer) -> TrainingRun:
    options = replace(OPTIONS, init_lr_frac=0.5)
    mid = resume.start_or_resume("mid", options, runtime, tokenizer, parent=checkpoint.find("base"), data="talk")
    train(mid, batches(FewRows()), 3, **{**HOW, "samples": lambda: ["Who? — ```\n# not a heading", "<b>bold</b>"]})
    return mid


@pytest.fixture(scope="session")
def trained_once(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory that the others are copies of."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, Runtime.start("cpu") as runtime:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        base = begin(runtime, tokenizer)
        train(base, batches(FewRows()), 24, **HOW, evaluation=Evaluation(8, lambda _: {"bpb": 2.0 - base.step / 100}))
        train_mid(runtime, tokenizer)
    return folder


@pytest.fixture
def trained(trained_once: Path, base_dir: Path) -> Path:
    """A base directory of the test's own with the trained models in it."""
    return Path(shutil.copytree(trained_once, base_dir, dirs_exist_ok=True))
