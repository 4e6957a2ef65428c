"""Small real parts for the tests: a tokenizer trained on the embedded text, models of two layers, a fake hub."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.data import demo_data
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from tests.hub.fake_hub import FakeHub
from tests.hub.small_data import write_datasets
from tests.machine import MEMINFO, FakeMachine

StartHub = Callable[..., str]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a script starts with & ignores Ctrl-C, its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 512, trained on 300 articles."""
    return Tokenizer.train(demo_data.documents("train")[:300], vocab_size=512)


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty base directory for one test."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DEMO", raising=False)  # set by an earlier test of --demo
    return tmp_path


def random_model(vocab_size: int = 512, depth: int = 2, sequence_len: int = 64, **shape: Any) -> GPT:
    """Make a model with random weights, also in the head and the residual projections."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(depth, vocab_size, sequence_len)
    model = GPT(replace(config, **shape))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return model


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """A machine with 120 GB of memory, no GPU and the system's commands."""
    fake = FakeMachine(tmp_path / "root", tmp_path / "bin", tmp_path / "calls")
    fake.bin.mkdir()
    fake.write("proc/meminfo", MEMINFO)
    monkeypatch.setenv("NANOCHAT_ROOT", str(fake.root))
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small datasets in the real schemas; not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    write_datasets(root)
    return root


@pytest.fixture
def real_data() -> Path:
    """The folder with the real datasets, for the few tests that need them."""
    shared = os.environ.get("NANOCHAT_SHARED")
    if not shared:
        pytest.skip("NANOCHAT_SHARED does not name the folder with the real datasets")
    return Path(shared) / "hub"


@pytest.fixture
def start_hub(monkeypatch: pytest.MonkeyPatch, small_data: Path) -> Iterator[StartHub]:
    """Start a fake hub for this process and return its address: `start_hub("--root", folder, "--cut", 2)`.

    The options are FakeHub's fields; by default it serves `small_data` without faults. Retries are quick.
    """
    with ExitStack() as stack:

        def start(*options: object) -> str:
            names = [str(name).removeprefix("--").replace("-", "_") for name in options[::2]]
            fields = dict(zip(names, options[1::2], strict=True))
            hub = stack.enter_context(FakeHub(**{"root": small_data, **fields}))  # type: ignore[arg-type]
            hub.replace_the_real_one(monkeypatch)
            return hub.address

        yield start
