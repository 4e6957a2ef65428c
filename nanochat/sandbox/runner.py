"""Runs a program that somebody else wrote, such as a model's solution to a HumanEval problem.

A process of its own (nanochat.sandbox.jail) without network, other processes, or files outside a temporary folder;
5 seconds, 256 MB; killed whatever it does. Needs Linux 5.13 or later with Landlock and seccomp.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.sandbox import jail

TIME_LIMIT_SECONDS = 5.0
MEMORY_LIMIT_BYTES = 256 << 20
FILE_LIMIT_BYTES = 4 << 20
"""One file; that and the number of open files bound what a program can hide in files it has unlinked."""
OPEN_FILES = 32
FOLDER_LIMIT_BYTES = 16 << 20
FOLDER_LIMIT_FILES = 200
LOOK_EVERY_SECONDS = 0.01


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    passed: bool
    """whether it came to its end without an exception or an exit"""
    reason: str
    """what stopped it, empty if it passed"""


def missing_protection() -> str | None:
    """What keeps this machine from confining a program, in a few words; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"{platform.system()} has no Landlock"
    if platform.machine() not in jail.ARCHITECTURES:
        return f"there is no list of system calls for {platform.machine()}"
    return None if jail.landlock_version() else "this kernel offers no Landlock"


def run_program(program: str, *, time_limit: float = TIME_LIMIT_SECONDS, unconfined: bool = False) -> ProgramResult:
    """Run Python source to its end, or until a limit. From any thread; several may run at once.

    `unconfined` runs it with this user's rights, limited in time and memory only, for machines that can do no better.
    Raises UserError where the machine cannot confine it and that is not asked for.
    """
    if not unconfined and (reason := missing_protection()):
        raise UserError(
            f"code that a model wrote would run unprotected here ({reason}): use a Linux machine, or pass "
            "--unconfined-code if you accept that it may do what you may do"
        )
    token = secrets.token_hex(16)
    task = {
        "program": program,
        "token": token,
        "confine": not unconfined,
        "memory_bytes": MEMORY_LIMIT_BYTES,
        "cpu_seconds": int(time_limit) + 1,
        "file_bytes": FILE_LIMIT_BYTES,
        "open_files": OPEN_FILES,
    }
    folder = tempfile.mkdtemp(prefix="nanochat-program-")
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", jail.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"LC_ALL": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            stopped = _watch(process, json.dumps(task).encode(), Path(folder), time_limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)  # an unconfined program may have left a process that holds it
        said = (process.stdout.read(4096) or b"").decode(errors="replace")
        process.stdout.close()
        process.wait()
    finally:
        # shutil.rmtree recurses, and a program can nest folders deeper than Python may.
        subprocess.run(["rm", "-rf", "--", folder], check=False)
    if said.startswith(f"{token} "):
        problem = said.removeprefix(f"{token} ")
        raise UserError(f"cannot confine code that a model wrote ({problem}): pass --unconfined-code to run it anyway")
    if stopped is None and said == token:
        return ProgramResult(True, "")
    return ProgramResult(False, stopped or said.removeprefix("failed ") or _how_it_ended(process.returncode))


def _watch(process: "subprocess.Popen[bytes]", task: bytes, folder: Path, time_limit: float) -> str | None:
    """Hand over the task and wait; why the program has to be stopped, None if it ended by itself."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(task)
    end = time.monotonic() + time_limit
    while True:
        if _has_ended(process):
            return None
        if time.monotonic() > end:
            return f"took longer than {time_limit:g} seconds"
        if _is_too_full(folder):
            return f"wrote more than {FOLDER_LIMIT_BYTES >> 20} MB or {FOLDER_LIMIT_FILES} files"
        time.sleep(LOOK_EVERY_SECONDS)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    if not hasattr(os, "waitid"):  # macOS
        return process.poll() is not None
    # Not reaped yet, so the group's number cannot become another's before the group is killed.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _is_too_full(folder: Path) -> bool:
    size = count = 0
    for where, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):  # it may go while we look
                size += os.lstat(os.path.join(where, name)).st_blocks * 512
        if size > FOLDER_LIMIT_BYTES or count > FOLDER_LIMIT_FILES:
            return True
    return False


def _how_it_ended(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with {returncode}"
