"""Check two machines that train together, or copy the project and its data to others.

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
from nanochat.host import SSH
from nanochat.spark.cluster import Port, check_bandwidth, check_link, command_on, ports_of, shared_networks
from nanochat.spark.system import Check, print_checks
from nanochat.train import agreement

PROJECT = Path(__file__).resolve().parent.parent
PORT = 29_531
ALL_REDUCE_SECONDS = 180
CODE = ("nanochat", "scripts", "benchmarks")
"""Folders that sync mirrors, including deletions."""
IRREPLACEABLE = ("tokenizer", "identity_conversations.jsonl")
"""Files in the base directory that only --force overwrites: checkpoints depend on their tokenizer."""


@dataclass
class ClusterOptions:
    """Check or copy between machines that train together, given by their ssh names; localhost is this one.

    check A B: ssh, ports, frame size and all-reduce bandwidth. sync B: copy code and training data (tokenizer, token
    files, data of the later stages, identity conversations) from here to B, and run setup.sh there.
    """

    action: tyro.conf.Positional[Literal["check", "sync"]] = "check"
    hosts: tyro.conf.Positional[tuple[str, ...]] = ()
    dry_run: bool = False
    """sync: print the commands without running them"""
    force: bool = False
    """sync: overwrite the tokenizer and identity conversations of B if they differ"""


def main(options: ClusterOptions) -> None:
    if options.action == "sync":
        sync(options)
        return
    if len(options.hosts) != 2:
        raise UserError("check needs two hosts, such as ./nanochat.sh cluster check localhost spark-b")
    checks = check(*options.hosts)
    print_checks(Console(highlight=False), checks)
    if any(check.status == "failed" for check in checks):
        sys.exit(1)


def check(first: str, second: str) -> list[Check]:
    """Check the connection between two hosts; stop when a failure rules out the next check."""
    checks, ports = [], []
    for host in (first, second):
        try:
            ports.append(ports_of(host))
            checks.append(Check("ssh", "ok", f"{host} answers, {len(ports[-1])} ports with an address or RDMA"))
        except UserError as error:
            checks.append(Check("ssh", "failed", f"{host}: {error}", f"ssh-copy-id {host}"))
    if len(ports) < 2:
        return checks
    checks += check_link(*ports)
    pairs = shared_networks(*ports)
    if not pairs:
        return checks
    missing = [host for host in (first, second) if not is_set_up(host)]
    if missing:
        text = f"not measured: no {PROJECT}/.venv on {' and '.join(missing)}"
        return [*checks, Check("all-reduce", "warning", text, f"./nanochat.sh cluster sync {' '.join(missing)}")]
    return [*checks, all_reduce((first, second), pairs[0])]


def is_set_up(host: str) -> bool:
    """True if `host` has the project with a complete .venv at the same path as this machine."""
    command = command_on(host, "test", "-f", f"{PROJECT}/.venv/complete-run")
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=60).returncode == 0


def all_reduce(hosts: tuple[str, str], pair: tuple[Port, Port]) -> Check:
    """Measure the all-reduce with one process per host."""
    address = pair[0].address.split("/")[0]
    fix = f"is port {PORT} open on {address}? NCCL_DEBUG=INFO shows more"
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
        return Check("all-reduce", "failed", f"did not finish in {ALL_REDUCE_SECONDS} s", fix)
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        reason = next((error.strip().splitlines()[-1] for _, error in outputs if error.strip()), "failed")
        return Check("all-reduce", "failed", reason, fix)
    result = json.loads(outputs[0][0].splitlines()[-1])
    return check_bandwidth(result["gbps"], over_rdma=result["backend"] == "nccl" and bool(pair[0].device))


def all_reduce_script(rank: int, address: str, port: Port) -> str:
    """The shell script of one host. Gloo would otherwise choose its interface by the host's name."""
    own = os.environ.get("NANOCHAT_FOUND", "").split(",")  # variables that env.sh set for this machine alone
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": port.interface,
    }
    for name, value in os.environ.items():
        if name.startswith(("NCCL_", "NANOCHAT_BASE")) and name not in own:
            variables[name] = value
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    env = shlex.quote(f"{PROJECT}/scripts/env.sh")
    return f"export {exports}; source {env}; exec python -m nanochat.spark.cluster"


def sync(options: ClusterOptions) -> None:
    """Copy to all hosts. Raises UserError if a copy fails or would overwrite IRREPLACEABLE files."""
    if not options.hosts:
        raise UserError("sync needs a host, such as ./nanochat.sh cluster sync spark-b")
    for host in options.hosts:
        if not options.force and (differing := differing_files(host, paths.base_dir())):
            raise UserError(
                f"{host} has a different {' and '.join(differing)}, which its checkpoints may depend on: move it away "
                f"there, or overwrite it with ./nanochat.sh cluster sync {host} --force"
            )
        for command in sync_commands(host, paths.base_dir()):
            print(f"{host}: {shlex.join(command)}", flush=True)
            if not options.dry_run and subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
                raise UserError(f"failed, see above: fix it and run ./nanochat.sh cluster sync {host} again")


def differing_files(host: str, base: Path) -> list[str]:
    """IRREPLACEABLE files that exist on `host` with other contents, by a dry run of rsync."""
    sources = [f"{base}/./{name}" for name in IRREPLACEABLE if (base / name).exists()]
    if not sources:
        return []
    compare = ["--recursive", "--checksum", "--relative", "--existing", "--dry-run", "--out-format=%n"]
    command = ["rsync", *compare, "--rsh", shlex.join(SSH), *sources, f"{host}:{base}/"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode and "No such file" not in result.stderr:  # no base directory yet
        raise UserError(f"cannot compare files with {host}: {result.stderr.strip()}")
    changed = {line.split("/")[0] for line in result.stdout.splitlines() if not line.endswith("/")}
    return [name for name in IRREPLACEABLE if name in changed]


def sync_commands(host: str, base: Path) -> list[list[str]]:
    """The commands that copy code and data and set up .venv. No file in the other base directory is deleted."""
    rsync = ["rsync", "--archive", "--partial", "--rsh", shlex.join(SSH)]
    folders = [str(PROJECT / name) for name in CODE]
    files = [str(path) for pattern in ("*.sh", "*.py", "*.toml", "*.txt") for path in sorted(PROJECT.glob(pattern))]
    data = [f"{base}/./{name}" for name in sorted(agreement.files(base))]  # the part after /./ is the path there
    project, there = shlex.quote(str(PROJECT)), shlex.quote(str(base))
    commands = [
        [*SSH, host, f"mkdir -p {project} {there}"],
        [*rsync, "--delete", "--exclude=__pycache__", *folders, f"{host}:{PROJECT}/"],
        [*rsync, *files, f"{host}:{PROJECT}/"],
    ]
    if data:
        commands.append([*rsync, "--relative", "--info=progress2", *data, f"{host}:{base}/"])
    return [*commands, [*SSH, host, f"{project}/setup.sh --no-sudo --quiet"]]


if __name__ == "__main__":
    cli.run(main, ClusterOptions)
