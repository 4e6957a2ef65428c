"""Processes that other launchers start: the variables of PyTorchJob and of the Slurm script in docs/scaling.md."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
from nanochat.runtime import Runtime
with Runtime.start("cpu") as runtime:
    print(runtime.world.sum(runtime.world.rank + 1)[0], runtime.world.is_main, runtime.world.is_local_main)
"""


@pytest.mark.parametrize("has_local_rank", [False, True])
def test_two_processes_join(has_local_rank: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if "RANK" not in name}
    own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in "01":
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"} if has_local_rank else {}
        command = [sys.executable, "-c", SCRIPT]
        processes.append(subprocess.Popen(command, env=own | local | {"RANK": rank}, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0].split() for process in processes]
    assert said == [["3.0", "True", "True"], ["3.0", "False", str(not has_local_rank)]]
