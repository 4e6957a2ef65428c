"""Run an untrusted program, such as a model's solution to a HumanEval problem, and test it.

The program and its tests run in separate processes (nanochat.sandbox.jail) without network, subprocesses, or files
outside a temporary folder, for at most 5 seconds and with 256 MB each. Requires Linux 5.13 or later with Landlock and
seccomp.
"""

import contextlib
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from nanochat.errors import UserError
from nanochat.sandbox import jail

TIME_LIMIT_SECONDS = 5.0
LIMITS = {"AS": 256 << 20, "FSIZE": 4 << 20, "NOFILE": 32, "CORE": 0}
"""rlimits. Those of a file's size and of open files bound the disk space of unlinked files."""
MAX_THREADS = 64
FOLDER_LIMIT_BYTES = 16 << 20
FOLDER_LIMIT_FILES = 200
POLL_SECONDS = 0.01
Process = subprocess.Popen[bytes]

TEMPORARY_FOLDER = """
trap '' HUP INT PIPE TERM
folder=$(mktemp -d "$0/nanochat-program-XXXXXXXX") && echo "$folder" && read -r _
for attempt in 1 2 3; do
    rm -rf -- "$folder" && exit
    chmod -R u+rwx -- "$folder"
    sleep 0.1
done
"""
"""Shell script that creates a folder and removes it when standard input is closed, also by a kill of this process.

A program can nest folders deeper than shutil.rmtree can recurse, and can create some without permissions.
"""
FIX = "raise the limits of this shell (ulimit -a), or use another machine"
EXAMPLE = """
import collections, functools, hashlib, itertools, math, random, re, string, typing
space = bytes(32 << 20)
def total(numbers: typing.List[int]) -> int:
    return sum(numbers)
"""


class ProgramResult(NamedTuple):
    passed: bool  # True if program and tests ran to their end without an exception or an exit
    reason: str  # of the failure; empty if it passed


def missing_protection() -> str | None:
    """Return the reason why this machine cannot confine a program, None if it can."""
    if not sys.platform.startswith("linux"):
        return f"{platform.system()} has no Landlock"
    if platform.machine() not in jail.ARCHITECTURES:
        return f"{platform.machine()} has no list of system calls"
    return None if jail.landlock_version() else "this kernel has no Landlock"


def check_sandbox(*, unconfined: bool = False) -> None:
    """Raise UserError if a correct program does not pass on this machine or under the limits of this shell."""
    result = run_program(EXAMPLE, "assert candidate([1, 2]) == 3", "total", unconfined=unconfined)
    if not result.passed:
        raise UserError(f"a correct program fails in the sandbox ({result.reason}): {FIX}")


def run_program(
    program: str, tests: str = "", name: str = "", *, time_limit: float = TIME_LIMIT_SECONDS, unconfined: bool = False
) -> ProgramResult:
    """Run Python source, then tests that call its function `name` as `candidate(...)`, until a limit is exceeded.

    Arguments and results are copied as plain values, so the program can reach neither the tests nor their outcome. Only
    an outcome with tests can be relied on: without any, a program may claim to have run to its end. Thread-safe.

    `unconfined` runs it with this user's permissions, with only time and memory limited, on machines without a sandbox.
    Raises UserError if the machine cannot confine it and `unconfined` is not set, or if a process cannot be started.
    """
    if not unconfined and (reason := missing_protection()):
        raise UserError(
            f"model-written code would run without a sandbox ({reason}): use a Linux machine, or pass "
            "--unconfined-code to run it with your own permissions"
        )
    task = {
        "program": program,
        "name": name,
        "limits": LIMITS | {"CPU": int(time_limit) + 1},
        "landlock": 0 if unconfined else jail.landlock_version(),
    }
    try:
        with _temporary_folder() as folder, contextlib.ExitStack() as stack:
            program_end, tests_end = socket.socketpair()
            with program_end, tests_end:  # only the two processes keep them open
                tested = _start(stack, program_end, task | {"tests": ""}, folder)
                tester = _start(stack, tests_end, task | {"tests": tests or "pass"}, folder)
            for process in (tested, tester):  # it confirms this before it runs any code of the program
                if (line := _pipe(process.stdout).readline()) != jail.CONFINED:
                    raise OSError(line.decode(errors="replace") or "Python ended at its start")
            stopped = _watch(tested, tester, folder, time_limit)
            report = b"" if stopped else _pipe(tester.stdout).read()
    except OSError as error:
        raise UserError(f"cannot run model-written code ({error}): {FIX}") from None
    reason = stopped or report.decode(errors="replace").removeprefix("failed ")
    if reason == jail.ENDED:
        code = tested.returncode
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return ProgramResult(True, "") if report == jail.PASSED else ProgramResult(False, reason)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Create a folder that another process removes when the block or this process ends."""
    with subprocess.Popen(
        ["sh", "-c", TEMPORARY_FOLDER, tempfile.gettempdir()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as remover:
        folder = os.fsdecode(_pipe(remover.stdout).readline()).removesuffix("\n")
        if not folder:
            raise OSError(f"no folder can be created in {tempfile.gettempdir()}")
        yield folder


def _start(stack: contextlib.ExitStack, peer: socket.socket, task: dict[str, Any], folder: str) -> Process:
    """Start nanochat.sandbox.jail with a task; `stack` kills it and its subprocesses."""
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", jail.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"LC_ALL": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            pass_fds=[peer.fileno()],
            start_new_session=True,
        )
    )
    stack.callback(_kill, process)
    with contextlib.suppress(BrokenPipeError), _pipe(process.stdin) as file:
        file.write(json.dumps(task | {"peer": peer.fileno(), "parent": os.getpid()}).encode())
    return process


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    assert file
    return file


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _watch(tested: Process, tester: Process, folder: str, time_limit: float) -> str | None:
    """Wait for the tests. Returns why the processes must be killed, None if the tests ended by themselves."""
    end = time.monotonic() + time_limit
    # WNOWAIT: not reaped yet, so that the id of the process group is not reused before the group is killed.
    while os.waitid(os.P_PID, tester.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return f"took longer than {time_limit:g} seconds"
        if _is_too_full(folder):
            return f"wrote more than {FOLDER_LIMIT_BYTES >> 20} MB or {FOLDER_LIMIT_FILES} files"
        if _num_threads(tested) > MAX_THREADS:
            return f"started more than {MAX_THREADS} threads"
        time.sleep(POLL_SECONDS)
    return None


def _num_threads(process: Process) -> int:
    try:
        return os.stat(f"/proc/{process.pid}/task").st_nlink - 2
    except OSError:  # not Linux
        return 0


def _is_too_full(folder: str) -> bool:
    """True if the folder exceeds a limit, or has parts that cannot be read: too deep, without permission, or moving."""
    for _ in range(10):  # a file may be deleted meanwhile
        with contextlib.suppress(OSError):
            entries = list(itertools.islice(_entries(folder), FOLDER_LIMIT_FILES + 1))
            return len(entries) > FOLDER_LIMIT_FILES or sum(entries) > FOLDER_LIMIT_BYTES
    return True


def _entries(folder: str) -> Iterator[int]:
    """Bytes on disk of each file and folder below `folder`."""
    for entry in list(os.scandir(folder)):
        yield entry.stat(follow_symlinks=False).st_blocks * 512
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)
