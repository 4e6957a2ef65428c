"""A stopped and resumed run equals one that was never stopped, bit for bit, at every stage."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import paths
from nanochat.conversations import Conversation, conversation
from nanochat.data import demo_data
from nanochat.data.batches import BatchSource, RowBatches, StreamRows
from nanochat.data.packing import PackedRows, TrimmedBatches
from nanochat.data.token_files import TokenFile
from nanochat.data.token_writer import write_conversations, write_documents
from nanochat.dist import World
from nanochat.inference.chat import ChatModel
from nanochat.inference.engine import Engine
from nanochat.inference.sampling_params import SamplingParams
from nanochat.model.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.telemetry.run_log import read_steps
from nanochat.tokenizer import Tokenizer
from nanochat.train import checkpoint, resume
from nanochat.train.checkpoint import Checkpoint
from nanochat.train.grpo import RolloutBatches
from nanochat.train.loop import train
from nanochat.train.options import TrainOptions
from nanochat.train.run import TrainingRun
from tests.training import HOW, EvenLength, FewRows, Stopping, batches, begin
from tests.training import OPTIONS as SHORT

SEQUENCE_LEN, STEPS = 96, 6
OPTIONS = TrainOptions(
    tracker="none", device_type="cpu", device_batch_size=4, save_every=2, warmdown_ratio=0.5, sample_every=0
)  # fmt: skip


def chats() -> list[Conversation]:
    return [
        conversation(f"Describe {text[:20]}", text[: 20 + 7 * i])
        for i, text in enumerate(demo_data.documents("train")[:24])
    ]


class Stages:
    """The batches of each stage, from real parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        folder = paths.tokens_dir("test")
        write_documents(folder, "text", tokenizer, demo_data.documents("train")[:40], "text")
        write_conversations(folder, "chat", tokenizer, chats(), "chat")
        self.text = TokenFile.open(folder, "text", tokenizer)
        self.chat = TokenFile.open(folder, "chat", tokenizer)
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_id

    def base(self, run: TrainingRun) -> BatchSource:
        return self._rows(StreamRows(self.text, SEQUENCE_LEN, self.bos_id))

    def mid(self, run: TrainingRun) -> BatchSource:
        return self._rows(PackedRows(self.chat, SEQUENCE_LEN, self.bos_id, learn_all=True))

    def sft(self, run: TrainingRun) -> BatchSource:
        rows = PackedRows(self.chat, SEQUENCE_LEN, self.bos_id, learn_all=False, documents_per_row=1)
        return self._rows(rows, TrimmedBatches)

    def rl(self, run: TrainingRun) -> BatchSource:
        return RolloutBatches(
            ChatModel("rl", Engine(run.model, self.tokenizer)),
            EvenLength(),
            run.runtime,
            problems_per_step=3,
            samples_per_problem=4,
            device_batch_size=4,
            sampling=SamplingParams(max_tokens=12, top_k=None, seed=3),
        )

    def _rows(self, rows: Any, kind: type[RowBatches] = RowBatches) -> BatchSource:
        return kind(rows, rows_per_step=6, device_batch_size=4, world=World(), seed=1)


def logged(run: TrainingRun) -> list[dict[str, Any]]:
    """Return the logged steps without the figures that depend on clock and machine."""
    measured = ("tokens_per_second", "flops_per_second", "mfu", "seconds", "memory_available_bytes", "page_cache_bytes")
    return [
        {name: value for name, value in row.items() if name not in measured}
        for row in read_steps(run.folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("source", ["base", "mid", "sft", "rl"])
def test_every_stage_resumes_bit_for_bit(base_dir: Path, tokenizer: Tokenizer, source: str) -> None:
    stages = Stages(tokenizer)
    config = GPTConfig.from_depth(2, tokenizer.vocab_size, SEQUENCE_LEN)
    with Runtime.start("cpu") as runtime:

        def started(source: str, tag: str, parent: Checkpoint | None) -> TrainingRun:
            options = replace(OPTIONS, model_tag=tag)
            return resume.start_or_resume(
                source, options, runtime, tokenizer, config=None if parent else config, parent=parent
            )

        parent = None
        if source != "base":
            before = started("base", "parent", None)
            train(before, stages.base(before), 2, **HOW)
            parent = checkpoint.find("base")
        straight = started(source, "straight", parent)
        train(straight, getattr(stages, source)(straight), STEPS, **HOW)
        for stop in (1, 2, 4):
            stopped = started(source, "stopped", parent)
            assert stopped.step == {1: 0, 2: 2, 4: 3}[stop]
            with pytest.raises(KeyboardInterrupt):
                train(stopped, Stopping(getattr(stages, source)(stopped), stop), STEPS, **HOW)
        resumed = started(source, "stopped", parent)
        assert resumed.step == 5
        train(resumed, getattr(stages, source)(resumed), STEPS, **HOW)
    assert logged(resumed) == logged(straight)
    assert any(row["loss"] for row in logged(straight))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    own, other = straight.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    torch.testing.assert_close(own, other, rtol=0, atol=0)


def train_in_a_process(base: str, tag: str) -> None:
    """A run of twenty steps, each saved; for a process that is killed."""
    os.environ["NANOCHAT_BASE_DIR"] = base
    torch.set_num_threads(1)
    with Runtime.start("cpu") as runtime:
        run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), replace(SHORT, model_tag=tag, save_every=1))
        train(run, batches(FewRows()), 20, **HOW)


def test_a_run_killed_while_it_starts_trains_and_saves_loses_nothing(base_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(paths.tokenizer_dir())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_resume"])

    def folder(tag: str) -> Path:
        return paths.checkpoints_dir("base") / tag

    def steps() -> int:
        return len(checkpoint.checkpoints(folder("killed")))

    def kill_when(condition: Callable[[], bool]) -> None:
        process = context.Process(target=train_in_a_process, args=(str(base_dir), "killed"))
        process.start()
        deadline = time.monotonic() + 120
        while not condition():
            assert process.is_alive() and time.monotonic() < deadline
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    kill_when(lambda: bool(list(folder("killed").glob(".step_*.partial"))))
    kill_when(lambda: steps() > 0)
    kill_when(lambda: (folder("killed") / "run.json").exists())
    kill_when(lambda: bool(list(folder("killed").glob(".step_00001*.partial"))))
    for tag in ("killed", "never-stopped"):
        process = context.Process(target=train_in_a_process, args=(str(base_dir), tag))
        process.start()
        process.join(120)
        assert process.exitcode == 0
    killed, expected = (read_steps(folder(tag) / "metrics.jsonl") for tag in ("killed", "never-stopped"))
    assert [(row["step"], row["loss"]) for row in killed] == [(row["step"], row["loss"]) for row in expected]
    assert {c.damage() for c in checkpoint.saved_steps(folder("killed"))} == {None}


PROCESS = """
import signal, sys
from dataclasses import replace
import torch
from nanochat import paths
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.loop import train
from tests.training import FewRows, HOW, OPTIONS, Stopping, batches, begin

torch.set_num_threads(1)
tag, stop = sys.argv[1], int(sys.argv[2])
with Runtime.start("cpu") as runtime:
    run = begin(runtime, Tokenizer.load(paths.tokenizer_dir()), replace(OPTIONS, model_tag=tag, device_batch_size=3))
    source = batches(FewRows(64), run.options, runtime.world)
    try:
        train(run, Stopping(source, stop) if runtime.world.is_main else source, 12, **HOW)
    except KeyboardInterrupt:
        pass
"""


def test_another_number_of_processes_goes_on_where_the_first_stopped(base_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(paths.tokenizer_dir())
    (base_dir / "process.py").write_text(PROCESS)
    environment = os.environ | {
        "PYTHONPATH": f"{Path(__file__).parent.parent.parent}:{base_dir}",
        "OMP_NUM_THREADS": "1",
    }

    def run(processes: int, tag: str, stop: int) -> None:
        launcher = ["scripts.launch", str(processes)] if processes > 1 else []
        command = [sys.executable, "-m", *launcher, "process", tag, str(stop)]
        subprocess.run(command, cwd=base_dir, env=environment, check=True, timeout=150, capture_output=True)

    run(1, "straight", -1)
    for processes, stop in ((2, 3), (1, 7), (2, -1)):
        run(processes, "changing", stop)
    one, other = (read_steps(paths.checkpoints_dir("base") / tag / "metrics.jsonl") for tag in ("straight", "changing"))
    assert [row["step"] for row in other] == list(range(1, 13))
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], abs=1e-3)
    assert [row["tokens"] for row in other] == [row["tokens"] for row in one]
