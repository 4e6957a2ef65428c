"""Start a stage in several processes, on this machine or on several.

python -m scripts.launch 2 scripts.base_train --depth 4
./pretrain.sh --hosts spark-1,spark-2 --depth 20

The first is torchrun, but exits with the code of the process that failed first instead of a traceback. The second, run
on spark-1, also starts the same command on spark-2 over ssh; --print only prints the command for each machine.
nanochat/train/agreement.py checks that the machines have the same code and data.
"""

import logging
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

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from nanochat.host import SSH

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = "29500"
EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_SSH = 2, 130, 255
SECONDS_TO_STOP = 600
"""Time for interrupted processes to finish their step and save, before they are killed."""
SECONDS_TO_NOTICE = 30
"""Time for processes to fail by themselves after those of another machine have ended."""
FORWARDED = ("NPROC", "MASTER_PORT", "NANOCHAT_BASE_DIR", "NCCL_", "GLOO_", "OMP_", "HF_HUB_OFFLINE")
"""Prefixes of environment variables that are sent to the other machines."""
LIFELINE = "NANOCHAT_ENDS_WITH_INPUT"
"""Set on machines started over ssh: their run stops when standard input ends, since then the main machine is gone."""


def main(num_processes: str, module: str, *options: str) -> None:
    """Run `python -m module options` in processes and exit with their code."""
    if not any(option.split("=")[0] == "--hosts" for option in options):
        run_processes(num_processes, "--standalone", "-m", module, *options)
        return
    hosts, print_only, rest = parse_hosts(options)
    if print_only:
        for number, host in enumerate(hosts):
            print(f"on {host}:  {command_for(hosts, number, rest)}")
        return
    number = int(os.environ.get("NODE_RANK", "0"))
    started = "NODE_RANK" in os.environ
    others = [] if started else [RemoteHost(hosts[i], command_for(hosts, i, rest)) for i in range(1, len(hosts))]
    if LIFELINE in os.environ:
        threading.Thread(target=_stop_with_input, daemon=True).start()
    set_interface(hosts[1] if number == 0 else hosts[0])
    os.environ["NANOCHAT_HOST"] = hosts[number]  # this machine's name in messages
    if number:
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_NOTICE)  # only the main machine saves
    machines = [
        f"--nnodes={len(hosts)}", f"--node-rank={number}", f"--master-addr={without_user(hosts[0])}",
        f"--master-port={os.environ.get('MASTER_PORT', DEFAULT_PORT)}",
    ]  # fmt: skip
    try:
        run_processes(num_processes, *machines, "-m", module, *rest)
    finally:
        for other in others:
            other.end()


def run_processes(num_processes: str, *arguments: str) -> None:
    """Run torchrun with `num_processes` on this machine and exit with the code of the first process that failed."""
    logging.disable(logging.ERROR)  # the processes print their own errors
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal does not stop a run
    signal.signal(signal.SIGUSR1, lambda *_: forward(signal.SIGUSR1))
    # A variable instead of --shutdown-timeout: a torch that does not know it keeps its 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    parsed = parse_args([f"--nproc-per-node={num_processes}", *arguments])
    parsed.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"  # the default includes SIGHUP
    try:
        run(parsed)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode >= 0:
            sys.exit(first.exitcode)
        killed_by = signal.Signals(-first.exitcode)
        why = " (possibly out of memory)" if killed_by == signal.SIGKILL else ""
        print(f"error: process {rank} was ended by {killed_by.name}{why}", file=sys.stderr)
        sys.exit(128 + killed_by)
    except (KeyboardInterrupt, SignalException):  # torchrun raises the second once all processes have ended
        sys.exit(EXIT_INTERRUPTED)


def forward(number: signal.Signals) -> None:
    """Send a signal to the child processes."""
    for child in children():
        os.kill(child, number)


def children() -> list[int]:
    """The processes that torchrun started; it starts them once all machines have joined."""
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def parse_hosts(options: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """Return the hosts, whether only to print, and the remaining options. Exits with one line on a mistake."""
    rest, hosts = [], ""
    remaining = iter(options)
    for option in remaining:
        if option == "--hosts":
            hosts = next(remaining, "")
        elif option.startswith("--hosts="):
            hosts = option.removeprefix("--hosts=")
        elif option != "--print":
            rest.append(option)
    names = hosts.split(",")
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        fail(f'--hosts must be two or more machines, this one first, such as spark-1,spark-2, got "{hosts}"')
    rank = os.environ.get("NODE_RANK", "0")
    if rank not in map(str, range(len(names))):
        fail(f'NODE_RANK must be between 0 and {len(names) - 1}, the position in --hosts, got "{rank}"')
    return names, "--print" in options, rest


def command_for(hosts: Sequence[str], number: int, options: Sequence[str]) -> str:
    """The shell command that starts this stage on a machine."""
    own = os.environ.get("NANOCHAT_FOUND", "").split(",")  # variables that env.sh set for this machine alone
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED) and name not in own}
    if forwarded.get("NANOCHAT_BASE_DIR") == str(Path.home() / ".cache/nanochat"):
        del forwarded["NANOCHAT_BASE_DIR"]  # the default, which may be another path there
    environment = [f"{name}={value}" for name, value in forwarded.items()]
    script = os.environ.get("NANOCHAT_COMMAND", "./pretrain.sh")
    command = ["env", f"NODE_RANK={number}", *environment, script, "--hosts", ",".join(hosts), *options]
    return f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}"


def fail(message: str) -> NoReturn:
    """Exit as nanochat.cli does after a UserError, without loading it."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def without_user(host: str) -> str:
    """`spark-1` for `ada@spark-1`."""
    return host.rpartition("@")[2]


def set_interface(peer: str) -> None:
    """Set gloo's and NCCL's network interface to the one that leads to `peer`, instead of another or loopback."""
    try:
        command = ["ip", "-o", "route", "get", socket.gethostbyname(without_user(peer))]
        route = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return  # they choose by themselves
    if "dev" in route:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", route[route.index("dev") + 1])


class RemoteHost:
    """The part of a run on another machine, over ssh."""

    def __init__(self, host: str, command: str) -> None:
        self.host = host
        self._command = f"export {LIFELINE}=1; {command}"
        self._input, self._lifeline = os.pipe()
        self._ended_there, self._ended_here = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        # A separate session keeps Ctrl-C away from ssh: the processes of both machines agree to save and stop.
        ssh = [*SSH, self.host, self._command]
        code = subprocess.run(ssh, stdin=self._input, start_new_session=True, check=False).returncode
        self._ended_there.set()
        if code not in (0, EXIT_INTERRUPTED):
            hint = f": check that `ssh {self.host}` works without a password" if code == EXIT_SSH else ""
            print(f"error: {self.host} ended with exit code {code}{hint}", file=sys.stderr, flush=True)
            if not children():  # torchrun still waits for the other machine to join, and would for 15 minutes
                os._exit(EXIT_BAD_INPUT)
            if not self._ended_here.wait(SECONDS_TO_NOTICE):
                forward(signal.SIGKILL)

    def end(self) -> None:
        """Wait for it to end, which follows the end of the processes here, then kill it."""
        self._ended_here.set()
        self._ended_there.wait(SECONDS_TO_NOTICE)
        os.close(self._lifeline)


def _stop_with_input() -> None:
    """Stop as on SIGTERM when standard input ends: the main machine is gone, or is killing the run."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
