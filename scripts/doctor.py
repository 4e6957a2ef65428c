"""Check this machine before a long run: one line per check, with the command that fixes it.

./nanochat.sh doctor --depth 20
./nanochat.sh doctor --json
"""

import dataclasses
import json
import sys
from dataclasses import dataclass

from rich.console import Console

from nanochat import cli, host
from nanochat.spark import system
from nanochat.spark.system import Check, print_checks


@dataclass
class DoctorOptions:
    """Check the GPU, memory, disk, network and everything else that a run depends on."""

    depth: int = 20
    """layers of the planned model, for the disk space"""
    fast: bool = False
    """run only the quick checks and print only problems, as every stage does at its start"""
    json: bool = False
    """print one JSON object"""


def main(options: DoctorOptions) -> None:
    if options.fast:
        checks = [check for check in system.quick_checks() if check.status != "ok"]
    else:
        checks = all_checks(options.depth)
    if options.json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        print_checks(Console(highlight=False), checks)
    if not options.fast and any(check.status == "failed" for check in checks):
        sys.exit(1)


def all_checks(depth: int) -> list[Check]:
    """Run all checks: seconds on a CPU, up to a minute on a GPU."""
    from nanochat.spark.disk import disk_space  # loads torch, which the quick checks do not need
    from nanochat.spark.gpu import hardware_checks

    gpus = host.gpus()
    return hardware_checks(gpus) + system.thorough_checks(gpus, disk_space(depth).total, f"depth {depth}")


if __name__ == "__main__":
    cli.run(main, DoctorOptions)
