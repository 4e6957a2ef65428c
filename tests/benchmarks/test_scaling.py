"""The tables and formulas in docs/scaling.md agree with the code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from nanochat.hub import import_model
from nanochat.hub.convert_model import hf_model, round_weights, write_model
from nanochat.hub.convert_tokenizer import write_tokenizer
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.options import PretrainOptions
from nanochat.train.scaling import scale_options
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/scaling.md").read_text()


def test_the_tables_are_those_that_the_code_gives() -> None:
    assert scaling.memory_table() in PAGE
    assert scaling.speed_table() in PAGE
    spark, _, h100, _ = scaling.SETTINGS
    said = re.search(r"about depth (\d+)\s+on\s+a\s+Spark\s+and\s+(\d+)\s+on\s+an\s+80\s+GB\s+GPU", PAGE)
    assert said and (int(said[1]), int(said[2])) == (scaling.deepest(spark), scaling.deepest(h100))


@pytest.mark.parametrize("depth", scaling.BATCH)
def test_the_batch_is_what_pretraining_takes(depth: int) -> None:
    options = scale_options(PretrainOptions(depth=depth), scaling.shape(depth).config, Runtime.start("cpu"))
    assert options.total_batch_size == scaling.BATCH[depth]


def test_the_formula_for_the_optimizer_is_what_it_holds() -> None:
    for setting in scaling.SETTINGS:
        config = scaling.shape(20).config
        inside = config.num_parameters - 2 * config.vocab_size * config.n_embd
        formula = (4 * inside + 8 * (config.num_parameters - inside)) / setting.processes
        # Whole matrices are not shared out evenly among 64.
        assert scaling.needs(20, setting, 1).optimizer == pytest.approx(formula, rel=0.15)


# accelerate has no option for FSDP on CPUs.
ON_CPU = """
import runpy
import sys

import accelerate
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


class Accelerator(accelerate.Accelerator):
    def __init__(self):
        super().__init__(cpu=True)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def prepare(self, model, optimizer):
        model, optimizer = super().prepare(model, optimizer)
        print("holds", sum(parameter.to_local().numel() for parameter in model.parameters()), flush=True)
        return model, optimizer


accelerate.Accelerator = Accelerator
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""


@pytest.mark.slow
def test_an_exported_model_trains_under_accelerate_and_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (command,) = re.findall(r"^accelerate launch (.*) --num_processes 8 train.py ", PAGE, flags=re.MULTILINE)
    (tmp_path / "train.py").write_text(program)
    (tmp_path / "on_cpu.py").write_text(ON_CPU)
    model, exported, trained = random_model(), tmp_path / "exported", tmp_path / "trained"
    round_weights(model)
    write_model(model.state_dict(), model.config, tokenizer, exported)
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command.replace("bf16", "no")),
         "--num_processes=2", "on_cpu.py", "train.py", str(exported), str(trained)],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tokens = torch.arange(64).view(2, 32)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert losses[0] == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item() / 62, abs=1e-5)
    write_tokenizer(tokenizer, model.config.sequence_len, trained)
    imported = import_model.read_model(str(trained))
    assert import_model.compare_with_transformers(imported)  # raises if it computes something else
    losses.append(imported.model.loss(tokens[:, :-1], tokens[:, 1:]).item() / 62)
    assert losses == sorted(losses, reverse=True)
    held = [int(number) for number in re.findall(r"holds (\d+)", result.stdout)]
    assert sum(held) == sum(tensor.numel() for tensor in hf_model(model.config).parameters())
    assert held == pytest.approx([sum(held) / 2] * 2, rel=0.01)
