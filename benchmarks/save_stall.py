"""Time that saving a checkpoint stalls training: for the copy alone, or until everything is written.

python -m benchmarks.save_stall --depth 8
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import cli
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, software
from nanochat.train import checkpoint
from nanochat.train.checkpoint import CheckpointWriter
from nanochat.train.optim import MuonAdamW
from nanochat.train.options import TrainOptions, check_range
from nanochat.train.resume import optimizer_options


@dataclass
class SaveStallOptions:
    """Time both ways of saving a model, in turn."""

    depth: int = 8
    vocab_size: int = 65_536
    repeats: int = 3
    """times that each way is timed; the median counts"""
    folder: Path | None = None
    """on the disk to write to; by default a temporary one"""
    device_type: str = "auto"

    def __post_init__(self) -> None:
        check_range("repeats", self.repeats, 1)


def main(options: SaveStallOptions) -> None:
    with Runtime.start(options.device_type) as runtime, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        with torch.device(runtime.device):
            model = GPT(GPTConfig.from_depth(options.depth, options.vocab_size, 2048), runtime.compute_dtype)
        optimizer = MuonAdamW(model, optimizer_options(TrainOptions()))
        waiting, copying, writing = [], [], []
        for step in range(options.repeats):
            start = time.perf_counter()
            states = checkpoint.host_copy(model.state_dict()), checkpoint.host_copy(optimizer.state_dict())
            checkpoint.write(Path(folder), 1, *states, {"source": "base"})
            waiting.append(time.perf_counter() - start)
            del states
            writer = CheckpointWriter(Path(folder), keep_last=1, keep_every=0)
            start = time.perf_counter()
            writer.start(2 + step, model.state_dict(), optimizer.state_dict(), {"source": "base"})
            copying.append(time.perf_counter() - start)
            if failure := writer.finish():
                raise RuntimeError(failure)
            writing.append(time.perf_counter() - start)
        size = sum(file.stat().st_size for file in Path(folder).glob("step_*/*"))
        print(f"d{options.depth}, {size / 1e9:.2f} GB a checkpoint, {runtime.describe()}; {software()}")
        print(f"training waits until all is written: {statistics.median(waiting):.2f} s")
        print(f"training waits for the copy:         {statistics.median(copying):.2f} s")
        print(f"written in the background, after:    {statistics.median(writing):.2f} s")


if __name__ == "__main__":
    cli.run(main, SaveStallOptions)
