"""The loopback hub for tests that download.

NANOCHAT_SHARED names the folder that has hub/serve.py, a stand-in for the Hugging Face Hub; tests that need it are
skipped where it is not set.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from nanochat.data import transfer

StartHub = Callable[..., str]


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
