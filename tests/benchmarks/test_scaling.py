"""The tables and formulas in docs/scaling.md agree with the code."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import scaling
from nanochat.runtime import Runtime
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


SHARDED = """
from pathlib import Path
import torch.distributed as dist
{code}
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = load_sharded(Path("{folder}"), "cpu")
held = sum(parameter.to_local().numel() for parameter in model.parameters())
tokens = torch.arange(64).view(2, 32)
loss = model(tokens, labels=tokens).loss.item()
print(f"loss {{loss:.6f}} holds {{held}}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_goes_to_fsdp2_as_the_page_says(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    model = random_model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "meta.json").write_text(json.dumps({"model_config": asdict(model.config)}))
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(code=code, folder=tmp_path))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = re.findall(r"loss ([\d.]+) holds (\d+)", result.stdout)
    tokens = torch.arange(64).view(2, 32)
    expected = model.loss(tokens[:, :-1], tokens[:, 1:]).item() / 62
    assert [float(loss) for loss, _ in found] == pytest.approx([expected] * 2, abs=1e-5)
    assert sum(int(held) for _, held in found) == model.config.num_parameters
