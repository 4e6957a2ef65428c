"""The memory estimate is near the peak, and running out of memory costs one step's time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import paths
from nanochat.dist import World
from nanochat.model.cpu_kernels import saved_attention_weights
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import free_memory, is_out_of_memory
from nanochat.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train.checkpoint import host_copy
from nanochat.train.memory import ACTIVATIONS_PER_LAYER
from nanochat.train.optim import MuonAdamW, OptimizerOptions

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    # as scripts/env.sh sets them where a CPU computes
    "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_TOP_PAD_": "67108864",
}  # fmt: skip


def small_model(depth: int = 2, sequence_len: int = 128) -> tuple[GPT, MuonAdamW]:
    model = GPT(GPTConfig.from_depth(depth, 512, sequence_len))
    return model, MuonAdamW(model, OptimizerOptions())


def kept_for_backward(model: GPT) -> int:
    """Bytes that autograd keeps of a forward pass over 16 rows, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(16, model.config.sequence_len, dtype=torch.int64))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("depth", "compute_dtype", "count", "weights"),
    [
        (2, torch.float32, 128, 0),
        (4, torch.float32, 128, 0),
        # Queries 0 to 127 see 128 keys, 128 to 255 see 256, the last 44 all 300.
        (2, torch.float32, 300, 128 * 128 + 128 * 256 + 44 * 300),
        (4, torch.float32, 300, 128 * 128 + 128 * 256 + 44 * 300),
        (6, torch.bfloat16, 300, 256 * 256 + 44 * 300),
        (4, torch.bfloat16, 128, 128 * 128),
    ],
)
def test_activations_are_what_autograd_keeps(depth: int, compute_dtype: torch.dtype, count: int, weights: int) -> None:
    model = GPT(GPTConfig.from_depth(depth, 512, count), compute_dtype)
    one_layout = weights > 0 or model.config.n_head == 1  # of the attention's output
    per_layer = ACTIVATIONS_PER_LAYER["cpu"] - one_layout
    numbers = (per_layer * depth + 2) * model.config.n_embd * 16 * count
    numbers += depth * model.config.n_head * 16 * weights
    if compute_dtype != torch.float32:  # the matrices cast to it
        numbers += depth * 12 * model.config.n_embd**2
    assert kept_for_backward(model) == pytest.approx(numbers * compute_dtype.itemsize, rel=0.01)


def test_rows_shorter_than_the_context_may_keep_more() -> None:
    cpu = torch.device("cpu")
    assert (
        saved_attention_weights(2048, cpu, torch.bfloat16)
        == saved_attention_weights(512, cpu, torch.bfloat16)
        == (256 + 512) / 2
    )
    assert (
        saved_attention_weights(2048, torch.device("cuda"), torch.bfloat16)
        == saved_attention_weights(128, cpu, torch.float32)
        == 0
    )


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_fp8_keeps_less(compute_dtype: torch.dtype) -> None:
    model = GPT(GPTConfig.from_depth(2, 512, 128), compute_dtype)
    without = kept_for_backward(model)
    model.train_in_fp8()
    assert kept_for_backward(model) < without


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Return the last line of a Python process as JSON, and the other lines as `said`."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *said, last = result.stdout.splitlines()
    return {"said": " ".join(said), **json.loads(last)}


PEAK = """
import json, torch
from nanochat.train import memory
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.optim import MuonAdamW, OptimizerOptions
from nanochat.train.checkpoint import host_copy

def resident(peak):  # getrusage would count what the parent held
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024

before = resident(peak=False)
model = GPT(GPTConfig.from_depth(4, 8192, 256))
optimizer = MuonAdamW(model, OptimizerOptions())
tokens = torch.randint(8192, (16, 256))
for _ in range(2):  # the optimizer's zeros take memory once they are no longer all zero
    for _ in range(2):
        model.loss(tokens, tokens).backward()
    optimizer.step()
    saved = host_copy(model.state_dict()), host_copy(optimizer.full_state())  # held during the next step
needs = memory.estimate_memory(model, optimizer, 16, shared=True)
print(json.dumps({"estimate": needs.total, "measured": resident(peak=True) - before}))
"""


def test_the_estimate_is_near_the_peak() -> None:
    figures = run(PEAK)
    assert figures["estimate"] == pytest.approx(figures["measured"], rel=0.2)


def test_only_the_main_process_copies_what_it_saves_and_only_where_memory_is_shared() -> None:
    model, optimizer = small_model()
    copy = [*host_copy(model.state_dict()).values(), *optimizer.state_tensors]
    shared = memory.estimate_memory(model, optimizer, 1, shared=True)
    assert shared.checkpoint == sum(tensor.nbytes for tensor in copy)
    assert "checkpoint" in shared.describe()
    apart = memory.estimate_memory(model, optimizer, 1, shared=False)
    assert apart.total == shared.total - shared.checkpoint and "checkpoint" not in apart.describe()
    first, second = (MuonAdamW(model, OptimizerOptions(), World(rank, 2)) for rank in range(2))
    assert memory.estimate_memory(model, first, 1, shared=True).checkpoint == shared.checkpoint
    assert memory.estimate_memory(model, second, 1, shared=True).checkpoint == 0


def test_it_says_what_does_not_fit_and_what_does() -> None:
    model, optimizer = small_model()
    needs = memory.estimate_memory(model, optimizer, 64, shared=True)
    assert "warning" not in memory.explain(model, optimizer, 64, available=needs.total)
    half = memory.estimate_memory(model, optimizer, 32, shared=True).total
    text = memory.explain(model, optimizer, 64, available=half)
    assert "--device-batch-size 32" in text
    assert "smaller --depth" in memory.explain(model, optimizer, 64, available=2**20)


@pytest.mark.parametrize("most", [1, 5, 64])
def test_the_largest_that_fits_is_a_power_of_two_within_bounds(most: int) -> None:
    model, optimizer = small_model()
    exactly = memory.estimate_memory(model, optimizer, 16, shared=True).total
    assert memory.fitting_rows(model, optimizer, exactly, most) == min(16, 1 << (most.bit_length() - 1))
    assert memory.fitting_rows(model, optimizer, exactly - 1, most) == min(8, 1 << (most.bit_length() - 1))
    assert memory.fitting_rows(model, optimizer, 1000, most) == 0


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive"), False),
        (RuntimeError("shapes do not match"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(error) == ran_out


def test_there_is_memory_and_processes_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)


LIMITED = """
import json, resource, sys
from dataclasses import replace
import torch
from nanochat import paths
from nanochat.dist import World
from nanochat.data.batches import RowBatches
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.telemetry.run_log import read_steps
from nanochat.train.loop import train
from tests.training import FewRows, HOW, OPTIONS, batches, begin

class Limited:
    # In the second step, address space for a fraction of the activations of all the rows.
    def step_data(self, step):
        data = RowBatches(
            FewRows(512), rows_per_step=512, device_batch_size=512, world=World(), seed=1
        ).step_data(step)
        if step == 1 and sys.argv[1:] == ["limited"]:
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 32 * 2**20, -1))
        if step == 2:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        return data

torch.set_num_threads(1)
with Runtime.start("cpu") as runtime:
    run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), replace(OPTIONS, model_tag=f"run{len(sys.argv)}"))
    train(run, Limited(), 4, **HOW)
    losses = [row["loss"] for row in read_steps(run.folder / "metrics.jsonl")]
    print(json.dumps({"losses": losses, "max_rows": run.max_rows}))
"""


def test_a_step_that_runs_out_of_memory_is_taken_again_with_fewer_rows(base_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(paths.tokenizer_dir())
    free, limited = run(LIMITED), run(LIMITED, "limited")
    assert re.search("512.*256", limited["said"])
    assert limited["max_rows"] <= 256 and "out of memory" not in free["said"]
    assert limited["losses"] == pytest.approx(free["losses"], abs=1e-4)
