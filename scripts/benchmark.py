"""Benchmark this machine and write the figures to a file in benchmarks/results, to submit as a pull request.

./nanochat.sh benchmark
"""

import dataclasses
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import cli, host
from nanochat.errors import UserError
from nanochat.runtime import Runtime, commit, cpu_name
from nanochat.spark.gpu import hardware_checks

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"
STEP = "benchmarks.train_step"
STEP_ON_A_GPU = (
    f"{STEP} --depth 12 --max-seq-len 2048 --vocab-size 32768 --total-batch-size 524288 --device-batch-size 32"
)
ON_A_CPU = [f"{STEP} --peer transformers", "benchmarks.inference"]
ON_A_GPU = [STEP_ON_A_GPU, "benchmarks.inference --depth 12 --vocab-size 32768 --max-seq-len 2048"]
"""Benchmarks, each run with --json; on a GPU, at the size of a model worth training there."""
WITH_FP8 = [f"{STEP_ON_A_GPU} --fp8 --peer without-fp8"]
"""Compares FP8 with bf16, on GPUs that support FP8."""


@dataclass
class BenchmarkOptions:
    """Benchmark this machine and write the figures to a file. Takes a few minutes; the machine should be idle."""

    output: Path | None = None
    """output file; by default a new one in benchmarks/results"""


def main(options: BenchmarkOptions) -> None:
    start = time.strftime("%Y-%m-%d")
    facts = machine_facts()
    output = options.output or RESULTS / f"{start}-{re.sub(r'[^a-z0-9]+', '-', facts['name'].lower()).strip('-')}.json"
    checks = [dataclasses.asdict(check) for check in hardware_checks(host.gpus())]
    with Runtime.start() as runtime:
        wanted = (ON_A_GPU if runtime.device.type == "cuda" else ON_A_CPU) + (WITH_FP8 if runtime.has_fp8 else [])
    measured = [measure(*shlex.split(command)) for command in wanted]
    record = {"date": start, "machine": facts, "doctor": checks, "measured": measured}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(anonymous(json.dumps(record, indent=2)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror}): choose another file with --output") from None
    print(f"wrote {output}")
    print(f"To share it: git checkout -b results && git add {shlex.quote(str(output))} && git commit, then push")
    if any("error" in figures for figures in measured):
        sys.exit(1)


def machine_facts() -> dict[str, Any]:
    """Facts that affect the figures, without any that identify the owner."""
    gpus, memory = host.gpus(), host.memory()
    release = dict(line.split("=", 1) for line in host.read("etc/os-release").splitlines() if "=" in line)
    return {
        "name": gpus[0].name if gpus else cpu_name(),
        "gpus": [f"{gpu.name}, driver {gpu.driver}" for gpu in gpus],
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "memory_bytes": memory.total if memory else None,
        "system": f"{release.get('PRETTY_NAME', platform.system()).strip(chr(34))}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "commit": commit(),
    }


def anonymous(text: str) -> str:
    """Remove the path of the home folder, which a compiler's message may contain."""
    return text.replace(str(Path.home()), "~")


def measure(module: str, *arguments: str) -> dict[str, Any]:
    """Run one benchmark; return its command and its figures or error."""
    command = ["python", "-m", module, *arguments, "--json"]
    print(shlex.join(command), flush=True)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
    about = {"command": shlex.join(command), "seconds": round(time.perf_counter() - start, 1)}
    try:
        return {**about, "figures": json.loads(result.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        return {**about, "error": f"exit code {result.returncode} without figures"}


if __name__ == "__main__":
    cli.run(main, BenchmarkOptions)
