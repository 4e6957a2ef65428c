"""Attack this installation on this machine, and count the attacks that succeed.

python -m benchmarks.attack                    # all groups
python -m benchmarks.attack --groups jail tags

Servers listen on the loopback address only, and files are written to a temporary folder. Two cores that also did other
work needed 12 minutes. The exit code is 0 if no attack succeeded. docs/security.md lists what is protected and what is
not.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attacks import environment, files, local, sandbox, server
from nanochat import cli
from nanochat.errors import UserError
from nanochat.runtime import cpu_name, software

Group = Callable[[Path], Iterator[tuple[str, bool]]]
"""A group of attacks of one kind. Takes an empty folder; yields the name of each attack, and True if it succeeded.

$NANOCHAT_BASE_DIR is a folder inside it.
"""
GROUPS: list[Group] = [
    sandbox.jail,
    sandbox.exhaustion,
    sandbox.grading,
    local.tags,
    local.report,
    local.terminal,
    local.kills,
    files.files,
    environment.environment,
    server.render,
    server.connections,
    server.engines,
    server.stops,
    server.page,
    server.fuzz,
]

MAX_NAMES = 20  # printed per group


@dataclass
class AttackOptions:
    """Attack this installation on this machine, and count the attacks that succeed."""

    groups: tuple[str, ...] = ()
    """names of the groups to run; default: all"""


def main(options: AttackOptions) -> None:
    names = [group.__name__ for group in GROUPS]
    if unknown := set(options.groups) - set(names):
        raise UserError(f"--groups must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    print(f"{cpu_name()}, {os.cpu_count()} cores; {software()}", flush=True)
    start = time.monotonic()
    chosen = [group for group in GROUPS if not options.groups or group.__name__ in options.groups]
    outcomes = [outcome for group in chosen for outcome in run(group)]
    print_counts("all", outcomes, time.monotonic() - start)
    sys.exit(any(success for _, success in outcomes))


def run(group: Group) -> list[tuple[str, bool]]:
    """Run one group and print its counts and the attacks that succeeded."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanochat-attack-") as folder:
        os.environ["NANOCHAT_BASE_DIR"] = f"{folder}/base"
        outcomes = list(group(Path(folder)))
    print_counts(group.__name__, outcomes, time.monotonic() - start)
    for name in [name for name, success in outcomes if success][:MAX_NAMES]:
        print(f"  succeeded: {name}", flush=True)
    return outcomes


def print_counts(name: str, outcomes: list[tuple[str, bool]], seconds: float) -> None:
    succeeded = sum(success for _, success in outcomes)
    print(f"{name:12} {len(outcomes):6,} tried {succeeded:4} succeeded {seconds:5.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main, AttackOptions)
