"""A fake machine: a root folder, and commands that record how they were called."""

import stat
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat import host

MEMINFO = """MemTotal:       125000000 kB
MemFree:         20000000 kB
MemAvailable:    90000000 kB
Buffers:          1000000 kB
Cached:          60000000 kB
Shmem:            1000000 kB
SwapTotal:       16000000 kB
SwapFree:        16000000 kB
"""
GB10 = "NVIDIA GB10, GPU-1, 580.95.05, 12.1, 61, 2411, 88.5, 3003, 97, 9A.0B.25.00.00, 0x0000000000000000"
H100 = "NVIDIA H100 80GB HBM3, GPU-2, 580.95.05, 9.0, 55, 1980, 650.0, 1980, 99, 96.00.74.00.01, 0x0000000000000000"


@dataclass
class FakeMachine:
    """`root` stands for /; `calls` has one line per command that was called."""

    root: Path
    bin: Path
    calls_file: Path

    def write(self, path: str, text: str) -> Path:
        """Write a file below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def command(self, name: str, script: str = "") -> None:
        """Add a command that records its arguments and then runs `script`."""
        file = self.bin / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>"{self.calls_file}"\n{script}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def gpu(self, *lines: str) -> None:
        """Add an nvidia-smi that prints these lines, and the names for -L."""
        names = "".join(f"GPU {i}: {line.split(',')[0]}\\n" for i, line in enumerate(lines))
        rows = "".join(f"{line}\\n" for line in lines)
        self.command("nvidia-smi", f'case "$*" in -L) printf "{names}" ;; *) printf "{rows}" ;; esac')

    def older_driver(self, script: str) -> None:
        """Add an nvidia-smi without clocks_event_reasons; asked with the older name it runs `script`."""
        refusal = 'Field "clocks_event_reasons.active" is not a valid field to query.'
        self.command("nvidia-smi", f"case \"$*\" in *clocks_event*) echo '{refusal}'; exit 2 ;; esac\n{script}")

    @property
    def calls(self) -> list[str]:
        """The commands that were called, in order."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


def sample(line: str = GB10, **changes: object) -> host.GPU:
    gpu = host.parse_gpu(line)
    assert gpu
    return replace(gpu, **changes)  # type: ignore[arg-type]  # a test names fields that there are
