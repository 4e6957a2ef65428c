"""Is this machine fit for a run of days? A line for each thing, and the command that mends it.

./nanochat.sh doctor --depth 20
./nanochat.sh doctor --json
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from nanochat import cli, host
from nanochat.spark import quick
from nanochat.spark.checks import Check, print_checks, run_checks


@dataclass
class DoctorOptions:
    """Look at GPU, memory, disk, network and what else a run depends on."""

    depth: int = 20
    """the model planned: what the disk has to hold"""
    fast: bool = False
    """only what takes no time, and say only what is wrong; the stage scripts begin with it"""
    json: bool = False
    """print one JSON object"""


def main(options: DoctorOptions) -> None:
    if options.fast:
        checks = [check for check in quick.quick_checks() if check.status != "ok"]
    else:
        checks = thorough_checks(options.depth)
    if options.json:
        print(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        print_checks(Console(highlight=False), checks)
    if not options.fast and any(check.status == "failed" for check in checks):
        sys.exit(1)


def thorough_checks(depth: int) -> list[Check]:
    """All there is; some seconds, on a GPU up to a minute."""
    from nanochat.spark import surroundings  # torch takes seconds to load, which the fast part has not
    from nanochat.spark.disk import disk_space

    def room() -> Check:
        return surroundings.room(disk_space(depth).total, f"depth {depth}")

    gpus = host.gpus()
    return hardware_checks(gpus) + run_checks(
        {
            "toolkit": lambda: surroundings.toolkit(gpus),
            "compiler": lambda: surroundings.compiler(gpus),
            "swap": surroundings.swap,
            "disk": room,
            "suspend": quick.suspend,
            "network": surroundings.network,
            "logins": surroundings.logins,
            "time": surroundings.clock,
        }
    )


def hardware_checks(gpus: list[host.GPU]) -> list[Check]:
    """Those that tell of the machine, and not whose it is."""
    from nanochat.spark import compute

    checks: dict[str, Callable[[], Check | None]] = {"GPU": lambda: quick.gpu(gpus)}
    checks |= {"torch": compute.build} if gpus else {"CPU": compute.cpu}
    if compute.reaches_gpu():
        timed = {
            "matmul bf16": compute.matmul,
            "copy": compute.bandwidth,
            "attention": compute.attention,
            "Triton": compute.triton_kernel,
            "compile": compute.compiled,
        }
        checks |= {name: partial(compute.tried, name, check) for name, check in timed.items()}
        checks["clocks"] = lambda: quick.clocks(host.gpus())
    return run_checks({**checks, "memory": lambda: quick.memory(gpus)})


if __name__ == "__main__":
    cli.run(main, DoctorOptions)
