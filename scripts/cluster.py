"""Two machines that train together: look at what lies between them, and copy what the other one lacks.

./nanochat.sh cluster check localhost spark-b
./nanochat.sh cluster sync spark-b
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from nanochat import cli, paths
from nanochat.errors import UserError
from nanochat.spark.checks import Check, print_checks
from nanochat.spark.cluster import SSH, Port, command_on, judge_bandwidth, judge_link, ports_of, shared_networks
from nanochat.train import agreement

PROJECT = Path(__file__).resolve().parent.parent
PORT = 29_531
ALL_REDUCE_SECONDS = 180
CODE = ("nanochat", "scripts", "benchmarks")
"""Folders that the other machine has as they are here, what was deleted included."""
OWN = ("tokenizer", "identity_conversations.jsonl")
"""Below the base directory, what cannot be made again: checkpoints are of no use without their tokenizer."""


@dataclass
class ClusterOptions:
    """Two machines that train together, as ssh knows them; localhost is this one.

    check A B: ssh, ports, frames and all-reduce between them. sync B: copy code and what training reads (tokenizer,
    token files, the data of the later stages, identity conversations) from here to B, and make .venv there.
    """

    action: tyro.conf.Positional[Literal["check", "sync"]] = "check"
    hosts: tyro.conf.Positional[tuple[str, ...]] = ()
    dry_run: bool = False
    """sync: print the commands, and run none"""
    force: bool = False
    """sync: replace B's own tokenizer and identity conversations where they differ"""


def main(options: ClusterOptions) -> None:
    if options.action == "sync":
        sync(options)
        return
    if len(options.hosts) != 2:
        raise UserError("name the two machines, such as ./nanochat.sh cluster check localhost spark-b")
    checks = check(*options.hosts)
    print_checks(Console(highlight=False), checks)
    if any(check.status == "failed" for check in checks):
        sys.exit(1)


def check(first: str, second: str) -> list[Check]:
    """Everything between two hosts; what cannot be looked at until something else is mended is left out."""
    checks, ports = [], []
    for host in (first, second):
        found = ports_of(host)
        if isinstance(found, str):
            checks.append(Check("ssh", "failed", f"{host} cannot be asked: {found}", f"ssh-copy-id {host}"))
            continue
        ports.append(found)
        checks.append(Check("ssh", "ok", f"{host} answers, {len(found)} ports with an address or RDMA"))
    if len(ports) < 2:
        return checks
    checks += judge_link(*ports)
    pairs = shared_networks(*ports)
    if not pairs:
        return checks
    missing = [host for host in (first, second) if not is_set_up(host)]
    if missing:
        text = f"not measured: {' and '.join(missing)} has no {PROJECT}/.venv"
        return [*checks, Check("all-reduce", "warning", text, f"./nanochat.sh cluster sync {' '.join(missing)}")]
    return [*checks, all_reduce((first, second), pairs[0])]


def is_set_up(host: str) -> bool:
    """Whether the project with a complete .venv is there, at the same place as here."""
    command = command_on(host, "test", "-f", f"{PROJECT}/.venv/complete-run")
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60).returncode == 0


def all_reduce(hosts: tuple[str, str], pair: tuple[Port, Port]) -> Check:
    """Measure it, each host as one process."""
    address = pair[0].address.split("/")[0]
    processes = [
        subprocess.Popen(
            command_on(host, "bash", "-c", all_reduce_script(rank, address, port)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (host, port) in enumerate(zip(hosts, pair, strict=True))
    ]
    try:
        outputs = [process.communicate(timeout=ALL_REDUCE_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        return Check("all-reduce", "failed", f"no end in {ALL_REDUCE_SECONDS} s", f"is port {PORT} open on {address}?")
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        said = next((error.strip().splitlines()[-1] for _, error in outputs if error.strip()), "it failed")
        return Check("all-reduce", "failed", said, f"is port {PORT} open on {address}? NCCL_DEBUG=INFO tells more")
    result = json.loads(outputs[0][0].splitlines()[-1])
    return judge_bandwidth(
        result["gigabytes_per_second"], over_rdma=result["backend"] == "nccl" and bool(pair[0].device)
    )


def all_reduce_script(rank: int, address: str, port: Port) -> str:
    """What one host runs; gloo is told its interface, which by itself it takes from the host's name."""
    own = os.environ.get("NANOCHAT_FOUND", "").split(",")  # what env.sh found out about this machine alone
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": port.interface,
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(("NCCL_", "NANOCHAT_BASE")) and name not in own
        },
    }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    env = shlex.quote(f"{PROJECT}/scripts/env.sh")
    return f"export {exports}; source {env}; exec python -m nanochat.spark.all_reduce"


def sync(options: ClusterOptions) -> None:
    """Raises UserError if a copy fails, or would replace what is the other machine's own."""
    if not options.hosts:
        raise UserError("name the machines to copy to, such as ./nanochat.sh cluster sync spark-b")
    for host in options.hosts:
        own = [] if options.force else what_it_has_of_its_own(host, paths.base_dir())
        if own:
            raise UserError(
                f"{host} has another {' and '.join(own)} than this machine, and checkpoints there may belong to it: "
                f"set it aside there, or replace it with ./nanochat.sh cluster sync {host} --force"
            )
        for command in sync_commands(host, paths.base_dir()):
            print(f"{host}: {shlex.join(command)}", flush=True)
            if not options.dry_run and subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
                raise UserError(
                    f"that failed, for the reason above: mend it and run ./nanochat.sh cluster sync {host} again"
                )


def what_it_has_of_its_own(host: str, base: Path) -> list[str]:
    """Which of OWN are there already, and not as they are here. Asks rsync, which compares contents and copies none."""
    sources = [f"{base}/./{name}" for name in OWN if (base / name).exists()]
    if not sources:
        return []
    ask = ["--recursive", "--checksum", "--relative", "--existing", "--dry-run", "--out-format=%n"]
    command = ["rsync", *ask, "--rsh", shlex.join(SSH), *sources, f"{host}:{base}/"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode and "No such file" not in result.stderr:  # which is that there is no base directory yet
        raise UserError(f"{host} cannot be asked what it has: {result.stderr.strip()}")
    changed = {line.split("/")[0] for line in result.stdout.splitlines() if not line.endswith("/")}
    return [name for name in OWN if name in changed]


def sync_commands(host: str, base: Path) -> list[list[str]]:
    """Copy, and make .venv there. Nothing of the other machine's files below its base directory is deleted."""
    rsync = ["rsync", "--archive", "--partial", "--rsh", shlex.join(SSH)]
    folders = [str(PROJECT / name) for name in CODE]
    files = [str(path) for pattern in ("*.sh", "*.py", "*.toml", "*.txt") for path in sorted(PROJECT.glob(pattern))]
    data = [f"{base}/./{name}" for name in sorted(agreement.files(base))]  # what follows the dot is its path there
    quoted = shlex.quote(str(PROJECT)), shlex.quote(str(base))
    commands = [
        [*SSH, host, f"mkdir -p {quoted[0]} {quoted[1]}"],
        [*rsync, "--delete", "--exclude=__pycache__", *folders, f"{host}:{PROJECT}/"],
        [*rsync, *files, f"{host}:{PROJECT}/"],
    ]
    if data:
        commands.append([*rsync, "--relative", "--info=progress2", *data, f"{host}:{base}/"])
    return [*commands, [*SSH, host, f"{quoted[0]}/setup.sh --no-sudo --quiet"]]


if __name__ == "__main__":
    cli.run(main, ClusterOptions)
