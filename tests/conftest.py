"""Small real parts for the tests: a tokenizer trained on the embedded text, models of two layers, a hub on loopback.

NANOCHAT_SHARED names the folder that has hub/serve.py, a stand-in for the Hugging Face Hub; tests that need it are
skipped where it is not set.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nanochat.data import embedded, transfer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from tests.machine import MEMINFO, FakeMachine

StartHub = Callable[..., str]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a script starts with & ignores Ctrl-C, its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """120 GB of memory, no GPU, and no commands but the system's."""
    fake = FakeMachine(tmp_path / "root", tmp_path / "bin", tmp_path / "calls")
    fake.bin.mkdir()
    fake.write("proc/meminfo", MEMINFO)
    monkeypatch.setenv("NANOCHAT_ROOT", str(fake.root))
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def start_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartHub]:
    """Start a hub with the options of serve.py and make it this process's; gives its address. Retries are quick."""
    shared = os.environ.get("NANOCHAT_SHARED")
    if not shared:
        pytest.skip("NANOCHAT_SHARED does not name the folder with the loopback hub")
    started = []

    def start(*options: object) -> str:
        command = [sys.executable, str(Path(shared) / "hub" / "serve.py"), "--port", "0", *map(str, options)]
        hub = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(hub)
        assert hub.stdout
        address = hub.stdout.readline().split()[-1]
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        return address

    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.01)
    yield start
    for hub in started:
        hub.kill()
        hub.wait()
