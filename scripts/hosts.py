"""One stage on several machines.

./pretrain.sh --hosts spark-1,spark-2 --depth 20, typed on spark-1, starts the same line on spark-2 over ssh. With
`--print` it says what to type on each instead. What the machines have to agree on, and that they do, is the business
of nanochat/agreement.py; this starts them and sees to it that they end together.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nanochat.spark.cluster import SSH
from scripts import processes

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = "29500"
EXIT_BAD_INPUT = 2
PASSED_ON = ("NPROC", "MASTER_PORT", "NANOCHAT_BASE_DIR", "NCCL_", "GLOO_", "OMP_", "HF_HUB_OFFLINE")
"""Environment variables that hold for all machines, or how they begin."""
LIFELINE = "NANOCHAT_ENDS_WITH_INPUT"
"""Set on a machine that was started over ssh: its run ends when nothing holds its standard input open any more."""
SECONDS_TO_NOTICE = 30
"""How long processes may take to fail by themselves once another machine's have ended."""


def main(script: str, module: str, *options: str) -> None:
    """Run `module` on all machines and exit as it does."""
    hosts, wants_lines, command = split(options)
    rank = os.environ.get("NODE_RANK")
    if wants_lines:
        for number, host in enumerate(hosts):
            print(f"on {host}:  {line(script, hosts, number, command)}")
        return
    others = [] if rank else [Machine(host, line(script, hosts, i, command)) for i, host in enumerate(hosts) if i]
    number = int(rank or 0)
    if LIFELINE in os.environ:
        threading.Thread(target=_end_with_input, daemon=True).start()
    name_interface(hosts[1] if number == 0 else hosts[0])
    os.environ["NANOCHAT_HOST"] = hosts[number]  # how a message calls this machine
    machines = [
        f"--nnodes={len(hosts)}", f"--node-rank={number}", f"--master-addr={address(hosts[0])}",
        f"--master-port={os.environ.get('MASTER_PORT', DEFAULT_PORT)}",
    ]  # fmt: skip
    if number:
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_NOTICE)  # the main machine alone saves
    try:
        processes.main(os.environ.get("NPROC", "1"), module, *command, machines=machines)
    finally:
        for machine in others:
            machine.end()


def split(options: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The hosts, whether only to print, and the options that are the stage's. Exits with a sentence on a mistake."""
    rest, hosts = [], ""
    given = iter(options)
    for option in given:
        if option == "--hosts":
            hosts = next(given, "")
        elif option.startswith("--hosts="):
            hosts = option.removeprefix("--hosts=")
        elif option != "--print":
            rest.append(option)
    names = hosts.split(",")
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        fail(f"--hosts {hosts} does not name two or more machines: --hosts spark-1,spark-2, this one first")
    rank = os.environ.get("NODE_RANK", "0")
    if rank not in map(str, range(len(names))):
        fail(f"NODE_RANK={rank} is not the place of a machine in --hosts {hosts}: the nearest that is is 0")
    return names, "--print" in options, rest


def line(script: str, hosts: Sequence[str], number: int, options: Sequence[str]) -> str:
    """What to type on a machine."""
    own = os.environ.get("NANOCHAT_FOUND", "").split(",")  # what env.sh found out about this machine alone
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and name not in own}
    if passed.get("NANOCHAT_BASE_DIR") == str(Path.home() / ".cache/nanochat"):
        del passed["NANOCHAT_BASE_DIR"]  # the default, which may be elsewhere over there
    environment = [f"{name}={value}" for name, value in passed.items()]
    command = ["env", f"NODE_RANK={number}", *environment, f"./{script}", "--hosts", ",".join(hosts), *options]
    return f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"


def fail(sentence: str) -> NoReturn:
    """End as nanochat.cli does with a user's mistake; it is not imported for that, being slow to load."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def address(host: str) -> str:
    """The machine's name without the user's."""
    return host.rpartition("@")[2]


def name_interface(peer: str) -> None:
    """Tell gloo and NCCL which network interface leads to `peer`. Left alone, they may take another, or loopback."""
    try:
        command = ["ip", "-o", "route", "get", socket.gethostbyname(address(peer))]
        route = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return  # they look for themselves
    if "dev" in route:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", route[route.index("dev") + 1])


class Machine:
    """Another machine's part of the run, over ssh."""

    def __init__(self, host: str, command: str) -> None:
        self.host = host
        self._command = f"export {LIFELINE}=1; {command}"
        self._input, self._lifeline = os.pipe()
        self._ended_there, self._ended_here = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        # In a session of its own, so that Ctrl-C, which is for the processes here, leaves the connection alone: they
        # agree with those over there to save and to stop.
        ssh = [*SSH, self.host, self._command]
        code = subprocess.run(ssh, stdin=self._input, start_new_session=True, check=False).returncode
        self._ended_there.set()
        if code not in (0, processes.EXIT_INTERRUPTED):
            print(f"error: {self.host} ended with exit code {code}", file=sys.stderr, flush=True)
            if not self._ended_here.wait(SECONDS_TO_NOTICE):
                processes.pass_on(signal.SIGKILL)  # they may still wait to meet

    def end(self) -> None:
        """Wait for its end, which is near once the processes here have ended, and bring it about if need be."""
        self._ended_here.set()
        self._ended_there.wait(SECONDS_TO_NOTICE)
        os.close(self._lifeline)


def _end_with_input() -> None:
    """Stop as if asked to once standard input ends: the machine that started this one has gone, or is in a hurry."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
