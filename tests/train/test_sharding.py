"""Several processes: each keeps its part of the optimizer's state, and together they are one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import paths
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from nanochat.train.sharding import partition
from tests.conftest import random_model
from tests.training import HOW, OPTIONS, FewRows, batches, begin

ROOT = Path(__file__).resolve().parent.parent.parent
# One process of several. It trains up to a step and leaves behind what there is to compare.
PROCESS = """
import hashlib, json, sys
from pathlib import Path
from collections import Counter
from dataclasses import replace
import torch
import torch.distributed as dist
from nanochat import paths
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import FewRows, HOW, OPTIONS, batches, begin

sent = Counter()

def counted(collective):
    def call(tensor, *args, **kwargs):
        sent[collective.__name__] += tensor.nbytes
        if torch._C._current_graph_task_id() >= 0:
            sent["during backward"] += tensor.nbytes
        return collective(tensor, *args, **kwargs)
    return call

torch.set_num_threads(1)
tag, steps = sys.argv[1], int(sys.argv[2])
with Runtime.start("cpu") as runtime:
    run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), replace(OPTIONS, model_tag=tag, device_batch_size=3))
    start = run.step
    dist.reduce, dist.broadcast = counted(dist.reduce), counted(dist.broadcast)
    train(run, batches(FewRows(64), OPTIONS, runtime.world), steps, **HOW)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in run.model.parameters())
    found = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "state": sum(tensor.nbytes for tensor in run.optimizer.state_tensors),
        "reduced": sent["reduce"] // (steps - start),
        "overlapped": sent["during backward"] // (steps - start),
        "broadcast": sent["broadcast"],
        "parameters": run.model.config.num_parameters,
    }
    (paths.base_dir() / f"{tag}.{runtime.world.rank}.json").write_text(json.dumps(found))
# A thread of gloo that frees a tensor while the interpreter shuts down aborts the process.
threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not any("gloo" in thread for thread in threads), threads
"""


def train_in(processes: int, base_dir: Path, tag: str, steps: int) -> list[dict[str, Any]]:
    """Train the model `tag` up to step `steps` in several processes; what each of them found."""
    (base_dir / "process.py").write_text(PROCESS)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         str(base_dir / "process.py"), tag, str(steps)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    return [json.loads((base_dir / f"{tag}.{rank}.json").read_text()) for rank in range(processes)]


def train_alone(runtime: Runtime, tokenizer: Tokenizer, tag: str, steps: int) -> list[float]:
    """The same in this process; the losses of all steps so far."""
    run = begin(runtime, tokenizer, replace(OPTIONS, model_tag=tag))
    train(run, batches(FewRows(64)), steps, **HOW)
    return losses(tag)


def losses(tag: str) -> list[float]:
    return [row["loss"] for row in read_steps(paths.checkpoints_dir("base") / tag / "metrics.jsonl")]


@pytest.fixture
def runtime(base_dir: Path, tokenizer: Tokenizer) -> Runtime:
    tokenizer.save(paths.tokenizer_dir())
    return Runtime.start("cpu")


def test_two_processes_give_the_losses_of_one_with_half_the_state_each_and_send_while_they_go_backward(
    runtime: Runtime, base_dir: Path, tokenizer: Tokenizer
) -> None:
    alone = train_alone(runtime, tokenizer, "one", 20)
    first, second = train_in(2, base_dir, "two", 20)
    assert losses("two") == pytest.approx(alone, abs=1e-3)
    assert first["weights"] == second["weights"]
    whole = sum(tensor.nbytes for tensor in begin(runtime, tokenizer, OPTIONS).optimizer.state_tensors)
    assert first["state"] == second["state"] == whole / 2
    assert first["reduced"] == first["overlapped"] == 4 * first["parameters"]
    # Each step's weights, and once the state that the checkpoint at the end collects.
    assert first["broadcast"] == 20 * 4 * first["parameters"] + whole


def test_a_run_goes_on_in_another_number_of_processes(runtime: Runtime, base_dir: Path, tokenizer: Tokenizer) -> None:
    alone = train_alone(runtime, tokenizer, "one", 20)
    train_in(1, base_dir, "mixed", 5)
    found = train_in(4, base_dir, "mixed", 12)
    assert len({process["weights"] for process in found}) == 1
    assert train_alone(runtime, tokenizer, "mixed", 20) == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_every_row_has_one_owner(world_size: int) -> None:
    model = random_model(depth=3)
    owners = {name: torch.zeros(parameter.size(0)) for name, parameter in model.named_parameters()}
    for shard in partition(model, world_size):
        assert 0 <= shard.owner < world_size
        owners[shard.name][shard.rows] += 1
    assert all((count == 1).all() for count in owners.values())


@pytest.mark.parametrize(("depth", "world_size", "most"), [(2, 2, 1.0), (20, 8, 1.0), (6, 8, 1.15), (20, 64, 1.2)])
def test_the_shares_are_about_equal(depth: int, world_size: int, most: float) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, 512, 64))
    load = [0] * world_size
    for shard in partition(model, world_size):
        load[shard.owner] += shard.weight.numel()
    assert max(load) <= most * sum(load) / world_size
