"""Processes that other launchers start: the variables of PyTorchJob and of the Slurm script in docs/scaling.md."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.data import demo_data
from nanochat.data.token_writer import TextShard, write_shards
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint

SCRIPT = """
from nanochat.runtime import Runtime
with Runtime.start("cpu") as runtime:
    print(runtime.world.sum(runtime.world.rank + 1)[0], runtime.world.is_main, runtime.world.is_local_main)
"""


def start_two(*command: str, has_local_rank: bool) -> list[str]:
    """Run a command as two processes of a run, as another launcher would; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if "RANK" not in name}
    own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in "01":
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"} if has_local_rank else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command], env=own | local | {"RANK": rank}, stdout=subprocess.PIPE, text=True
            )
        )
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return printed


@pytest.mark.parametrize("has_local_rank", [False, True])
def test_two_processes_join(has_local_rank: bool) -> None:
    printed = start_two("-c", SCRIPT, has_local_rank=has_local_rank)
    assert [lines.split() for lines in printed] == [["3.0", "True", "True"], ["3.0", "False", str(not has_local_rank)]]


@pytest.mark.slow
def test_a_stage_runs_unchanged(base_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(paths.tokenizer_dir())
    shards = {split: [TextShard(split, "", lambda: demo_data.documents("train")[:10])] for split in ("train", "val")}
    write_shards(paths.tokens_dir("encyclopedia"), shards, tokenizer, workers=1)
    stage = ("-m", "scripts.base_train", "--dataset", "encyclopedia", "--depth", "1", "--max-seq-len", "64",
             "--num-iterations", "2", "--total-batch-size", "512", "--device-type", "cpu",
             "--tracker", "none")  # fmt: skip
    printed = start_two(*stage, has_local_rank=False)
    assert "2 processes" in printed[0] and "base d1: 2 steps" in printed[0]
    assert checkpoint.find("base", "d1").step == 2
