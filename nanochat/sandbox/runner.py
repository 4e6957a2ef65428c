"""Run an untrusted program, such as a model's solution to a HumanEval problem.

It runs in a separate process (nanochat.sandbox.jail) without network, subprocesses, or files outside a temporary
folder, for at most 5 seconds and with 256 MB. Requires Linux 5.13 or later with Landlock and seccomp.
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
from pathlib import Path
from typing import NamedTuple

from nanochat.errors import UserError
from nanochat.sandbox import jail

TIME_LIMIT_SECONDS = 5.0
MEMORY_LIMIT_BYTES = 256 << 20
FILE_LIMIT_BYTES = 4 << 20
"""Size of one file. With the number of open files it bounds the disk space of unlinked files."""
MAX_OPEN_FILES = 32
FOLDER_LIMIT_BYTES = 16 << 20
FOLDER_LIMIT_FILES = 200
POLL_SECONDS = 0.01


class ProgramResult(NamedTuple):
    passed: bool  # True if it ran to its end without an exception or an exit
    reason: str  # of the failure; empty if it passed


def missing_protection() -> str | None:
    """Return why this machine cannot confine a program, None if it can."""
    if not sys.platform.startswith("linux"):
        return f"{platform.system()} has no Landlock"
    if platform.machine() not in jail.ARCHITECTURES:
        return f"{platform.machine()} has no list of system calls"
    return None if jail.landlock_version() else "this kernel has no Landlock"


def run_program(program: str, *, time_limit: float = TIME_LIMIT_SECONDS, unconfined: bool = False) -> ProgramResult:
    """Run Python source until it ends or exceeds a limit. Thread-safe; several programs may run at once.

    `unconfined` runs it with this user's permissions, with only time and memory limited, on machines without a sandbox.
    Raises UserError if the machine cannot confine it and `unconfined` is not set.
    """
    if not unconfined and (reason := missing_protection()):
        raise UserError(
            f"model-written code would run without a sandbox ({reason}): use a Linux machine, or pass "
            "--unconfined-code to run it with your own permissions"
        )
    token = secrets.token_hex(16)
    limits = {"AS": MEMORY_LIMIT_BYTES, "CPU": int(time_limit) + 1, "FSIZE": FILE_LIMIT_BYTES, "NOFILE": MAX_OPEN_FILES}
    task = {"program": program, "token": token, "confine": not unconfined, "limits": limits | {"CORE": 0}}
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
        os.set_blocking(process.stdout.fileno(), False)  # a subprocess of an unconfined program may hold it open
        output = (process.stdout.read(4096) or b"").decode(errors="replace")
        process.stdout.close()
        process.wait()
    finally:
        # A program can nest folders deeper than shutil.rmtree can recurse.
        subprocess.run(["rm", "-rf", "--", folder], check=False)
    if output.startswith(f"{token} "):
        problem = output.removeprefix(f"{token} ")
        raise UserError(f"cannot confine model-written code ({problem}): pass --unconfined-code to run it anyway")
    if stopped is None and output == token:
        return ProgramResult(True, "")
    code = process.returncode
    how_it_ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return ProgramResult(False, stopped or output.removeprefix("failed ") or how_it_ended)


def _watch(process: "subprocess.Popen[bytes]", task: bytes, folder: Path, time_limit: float) -> str | None:
    """Send the task and wait. Returns why the program must be killed, None if it ended by itself."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(task)
    end = time.monotonic() + time_limit
    # WNOWAIT: not reaped yet, so that the id of the process group is not reused before the group is killed.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return f"took longer than {time_limit:g} seconds"
        if _is_too_full(folder):
            return f"wrote more than {FOLDER_LIMIT_BYTES >> 20} MB or {FOLDER_LIMIT_FILES} files"
        time.sleep(POLL_SECONDS)
    return None


def _is_too_full(folder: Path) -> bool:
    size = count = 0
    for where, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):  # it may be deleted meanwhile
                size += os.lstat(os.path.join(where, name)).st_blocks * 512
        if size > FOLDER_LIMIT_BYTES or count > FOLDER_LIMIT_FILES:
            return True
    return False
