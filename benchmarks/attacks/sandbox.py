"""Programs that try to leave the sandbox, to exhaust the machine, or to pass tests without solving the problem."""

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from nanochat.errors import UserError
from nanochat.sandbox import jail as inside
from nanochat.sandbox.runner import ProgramResult, run_program

PROGRAMS = tomllib.loads(Path(__file__).with_name("programs.toml").read_text())
OPEN_FLAGS = [
    access | extra
    for access in range(4)
    for extra in (0, os.O_TRUNC, os.O_CREAT, os.O_APPEND, os.O_TRUNC | os.O_NOFOLLOW, os.O_TRUNC | os.O_APPEND)
]
SYSTEM_CALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    ctypes.set_errno(0)
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38):  # EPERM, ENOSYS
        break
else:
    raise SystemExit("all refused")
"""
MAX_SYSTEM_CALL = 480
KILLING_CALLS = {335, 336}  # uretprobe and uprobe of x86_64, which Linux does not filter: they kill their caller
GO_DEEP = """
import os
at = os.open('.', os.O_RDONLY)
def go_deep():
    global at
    for _ in range(20):
        os.mkdir('d' * 250, dir_fd=at)
        new = os.open('d' * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = new
"""
TESTS = "assert candidate([3, 1, 2]) == [1, 2, 3]\nassert candidate([]) == []\nassert candidate([5, 4]) == [4, 5]\n"
FORGERIES = [
    f"import os, sys\nfor fd in range(64):\n  try: os.write(fd, {text!r})\n  except OSError: pass\n{end}"
    for text in (b"", b"confined\n", b"landlock_restrict_self: not permitted", b"[Errno 1] Operation not permitted\n")
    for end in ("os._exit(1)", "os._exit(0)", "os.abort()", "sys.exit(1)")
]
"""Programs that claim that the machine cannot confine them, which would end an evaluation."""


def jail(folder: Path) -> Iterator[tuple[str, bool]]:
    """Reach files, processes, the network and forbidden system calls, also as on kernels with an older Landlock."""
    secret = folder / "outside" / "secret"
    secret.parent.mkdir()
    names = f"import os\nFILE, FOLDER = {str(secret)!r}, {str(secret.parent)!r}\n"
    attacks = {name: names + program for name, program in PROGRAMS["escapes"].items()}
    attacks |= {f"open with flags {flags:o}": f"{names}os.open(FILE, {flags})" for flags in OPEN_FLAGS}
    for version in sorted({1, 2, 3, inside.landlock_version()}):
        secret.write_text("secret")
        with mock.patch.dict(os.environ, NANOCHAT_SECRET="secret"):
            for name, result in run_all(attacks, version).items():
                yield f"{name}, Landlock {version}", result.passed
        changed = secret.read_text() != "secret" or len(list(secret.parent.iterdir())) > 1
        yield f"a changed file, Landlock {version}", changed
    allowed = {*inside.allowed_system_calls(), *inside.OPEN_CALLS, inside.CLONE, inside.FCNTL, *KILLING_CALLS}
    numbers = [number for number in range(MAX_SYSTEM_CALL) if number not in allowed]
    refused = run_program(SYSTEM_CALLS.format(numbers=numbers)).reason == "SystemExit: all refused"
    yield from ((f"system call {number}", not refused) for number in numbers)


def exhaustion(folder: Path) -> Iterator[tuple[str, bool]]:
    """Use more time, memory, threads or disk than allowed, or leave files behind."""
    with mock.patch.object(tempfile, "tempdir", str(folder)):
        for name, result in run_all({name: GO_DEEP + text for name, text in PROGRAMS["endless"].items()}).items():
            yield name, result.passed
        for name, result in run_all({name: GO_DEEP + text for name, text in PROGRAMS["quota"].items()}).items():
            yield f"{name}: {result.reason}", result.passed or result.reason.startswith("took longer")
        yield "files left behind", bool(list(folder.iterdir()))
    for number in range(10):
        yield f"files left behind by kill {number}", leaves_files_when_killed(folder, delay=number / 50)


def leaves_files_when_killed(folder: Path, delay: float) -> bool:
    """Kill a process while it runs a program, and wait for its folder to be removed."""
    program = "open('a', 'w').close()\nwhile True: pass"
    code = f"from nanochat.sandbox.runner import run_program; print(flush=True); run_program({program!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
    deadline, empty_checks = time.monotonic() + 10, 0
    while empty_checks < 50:  # the folder may be created after the kill
        if time.monotonic() > deadline:
            return True
        empty_checks = 0 if any(folder.glob("nanochat-program-*")) else empty_checks + 1
        time.sleep(0.01)
    return False


def grading(folder: Path) -> Iterator[tuple[str, bool]]:
    """Pass tests without a solution, or forge that the machine cannot run the program."""
    for name, program in PROGRAMS["cheats"].items():
        yield name, run_program(f"import os\n{program}", TESTS, "f").passed
    for number, program in enumerate(FORGERIES):
        try:
            yield f"forged failure {number}", run_program(program, TESTS, "f").passed
        except UserError:
            yield f"forged failure {number}", True
    yield "a correct solution refused", not run_program("f = sorted", TESTS, "f").passed


def run_all(programs: dict[str, str], landlock_version: int | None = None) -> dict[str, ProgramResult]:
    version = landlock_version or inside.landlock_version()
    with mock.patch.object(inside, "landlock_version", lambda: version), ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(programs, pool.map(run_program, programs.values()), strict=True))
