"""Programs that others wrote can compute, and can do nothing else; each test is a way out that is closed."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.attacks.sandbox import FORGERIES, GO_DEEP, PROGRAMS, TESTS, leaves_files_when_killed
from nanochat.errors import UserError
from nanochat.sandbox import jail, runner
from nanochat.sandbox.runner import missing_protection, run_program

pytestmark = pytest.mark.skipif(missing_protection() is not None, reason=f"{missing_protection()}")

REFUSED = ("PermissionError", "OSError: [Errno 1]", "OSError: [Errno 13]")


def assert_refused(program: str) -> None:
    result = run_program(program)
    assert not result.passed
    assert result.reason.startswith(REFUSED), result.reason


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / ".ssh" / "id_ed25519"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.mark.parametrize(
    "program",
    [
        "assert sum(range(10)) == 45",
        "import collections, datetime, decimal, functools, hashlib, heapq, itertools, json, math, random, re",
        "from typing import List\ndef f(x: List[int]) -> int: return x[0]\nassert f([1]) == 1",
        "with open('notes.txt', 'w') as f: f.write('x')\nassert open('notes.txt').read() == 'x'",
        "import threading\nt = threading.Thread(target=lambda: None)\nt.start()\nt.join()",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
        "print('noise ' * 100_000)",
        "assert __name__ == '__main__'",
    ],
)
def test_a_program_that_computes_passes(program: str) -> None:
    assert run_program(program) == runner.ProgramResult(True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError: "),
        ("1 +", "SyntaxError: "),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "exited with 0"),
        ("import os\nos.abort()", "killed by SIG"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("x = input()", "EOFError: "),
        ("x = [0] * 10**9", "MemoryError: "),
        ("x = 'x'\nwhile True: x += x", "MemoryError: "),
        ("import torch", "ModuleNotFoundError: "),
        ("import nanochat", "ModuleNotFoundError: "),
    ],
)
def test_a_program_that_fails_does_not_pass(program: str, reason: str) -> None:
    result = run_program(program)
    assert not result.passed
    assert result.reason.startswith(reason)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\nwhile True: pass",
        "9 ** 9 ** 9 ** 9",
    ],
)
def test_time_is_limited(program: str) -> None:
    start = time.monotonic()
    assert run_program(program, time_limit=0.5).reason == "took longer than 0.5 seconds"
    assert time.monotonic() - start < 1.5


def test_a_thread_left_behind_does_not_delay_the_end() -> None:
    start = time.monotonic()
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert run_program(program).passed
    assert time.monotonic() - start < 3


def test_files_outside_cannot_be_read(secret: Path) -> None:
    assert_refused(f"open({str(secret)!r}).read()")
    assert_refused(f"import os\nos.open({str(secret)!r}, os.O_RDONLY)")
    assert_refused(f"import os\nos.listdir({str(secret.parent)!r})")
    assert_refused("open('/etc/passwd')")
    assert_refused("import os\nos.listdir('/')")


def test_other_processes_memory_and_environment_cannot_be_read() -> None:
    assert_refused("import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()")
    assert_refused("open('/proc/self/mem', 'rb')")
    assert_refused("import os\nos.listdir('/proc')")


def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ and 'secret' not in str(os.environ)").passed


def test_open_files_are_not_inherited(secret: Path) -> None:
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        program = (
            "import os\n"
            "for fd in range(4, 100):\n"
            "  try: data = os.pread(fd, 6, 0)\n"
            "  except OSError: continue\n"
            "  assert data != b'secret'"
        )
        assert run_program(program).passed


def test_files_outside_cannot_be_written(secret: Path) -> None:
    inside = secret.parent
    assert_refused(f"open({str(secret)!r}, 'w')")
    assert_refused(f"open({str(inside / 'new')!r}, 'w')")
    assert_refused(f"import os\nos.unlink({str(secret)!r})")
    assert_refused(f"import os\nos.mkdir({str(inside / 'folder')!r})")
    assert_refused(f"import os\nos.truncate({str(secret)!r}, 0)")
    assert_refused(f"import os\nos.chmod({str(secret)!r}, 0o777)")
    assert_refused(f"import os\nos.utime({str(secret)!r})")
    assert_refused(f"import os\nos.setxattr({str(secret)!r}, 'user.a', b'b')")
    assert_refused("open('/tmp/escaped', 'w')")
    assert_refused("open('/dev/shm/escaped', 'w')")
    assert secret.read_text() == "secret" and list(inside.iterdir()) == [secret]


def test_links_and_renames_lead_nowhere(secret: Path) -> None:
    assert_refused(f"import os\nos.symlink({str(secret)!r}, 'link')\nopen('link').read()")
    assert_refused(f"import os\nos.symlink({str(secret.parent)!r}, 'folder')\nopen('folder/new', 'w')")
    program = f"import os\ntry: os.link({str(secret)!r}, 'hard')\nexcept OSError: raise SystemExit\nopen('hard').read()"
    assert not run_program(program).passed
    assert "secret" in secret.read_text()
    moved = f"import os\nopen('mine', 'w').close()\nos.rename('mine', {str(secret.parent / 'moved')!r})"
    assert not run_program(moved).passed
    assert list(secret.parent.iterdir()) == [secret]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def test_there_is_no_network(listener: socket.socket) -> None:
    assert_refused(f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}))")
    assert_refused("import socket\nsocket.socket(socket.AF_UNIX)")
    assert_refused("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    assert_refused("import socket\nsocket.socketpair()")
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/sh', ['sh'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.setsid()",
        "import os\nos.forkpty()",
    ],
)
def test_no_process_can_be_started(program: str) -> None:
    assert_refused(program)


def test_other_processes_cannot_be_reached() -> None:
    calls = {"ptrace": 101, "process_vm_readv": 310, "pidfd_open": 434, "io_uring_setup": 425, "memfd_create": 319}
    if os.uname().machine == "aarch64":
        calls |= {"ptrace": 117, "process_vm_readv": 270, "memfd_create": 279}
    assert_refused("import os\nos.kill(os.getppid(), 9)")
    assert_refused("import os\nos.killpg(os.getpgid(os.getppid()), 9)")
    assert_refused("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)")
    assert_refused("import os\nos.sched_setaffinity(os.getppid(), {0})")
    assert_refused(
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())"  # SIGIO for the parent
    )
    for number in calls.values():
        program = (
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"assert libc.syscall({number}, 16, os.getppid(), 0, 0, 0, 0) == -1\n"
            "assert ctypes.get_errno() == 1, ctypes.get_errno()"
        )
        assert run_program(program) == runner.ProgramResult(True, "")


def test_limits_cannot_be_raised() -> None:
    raised = run_program("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))")
    assert raised.reason == "ValueError: not allowed to raise maximum limit"
    assert_refused("import os\nos.setuid(0)")


def test_the_disk_cannot_be_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    one_file = run_program("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))")
    assert one_file.reason.startswith(("OSError: [Errno 27]", "wrote more than"))
    full = "wrote more than 16 MB or 200 files"
    many = "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'wb').write(bytes(1 << 20))"
    assert run_program(many).reason == full
    assert run_program("i = 0\nwhile True:\n  i += 1\n  open(str(i), 'w').close()").reason == full
    nested = "import os\nat = os.getcwd()\nfd = os.open('.', os.O_RDONLY)\nwhile True:\n"
    nested += "  os.mkdir('d', dir_fd=fd)\n  new = os.open('d', os.O_RDONLY, dir_fd=fd)\n  os.close(fd)\n  fd = new"
    assert run_program(nested).reason == full
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["threads", "large files below PATH_MAX", "files in a folder that cannot be listed"])
def test_threads_and_files_out_of_sight_are_limited(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    assert run_program(GO_DEEP + PROGRAMS["quota"][name]).reason.startswith(("wrote more than", "started more than"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [1, 2])
def test_older_kernels_do_not_empty_files_opened_for_reading(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "landlock_version", lambda: version)
    for mode in ("os.O_RDONLY", "3"):
        assert_refused(f"import os\nopen('mine', 'w').close()\nos.open('mine', {mode} | os.O_TRUNC)")
    assert run_program("open('mine', 'w').close()\nopen('mine', 'w').close()\nopen('mine', 'r+').truncate()").passed


@pytest.mark.parametrize("name", PROGRAMS["cheats"])
def test_tests_pass_only_with_a_solution(name: str) -> None:
    assert not run_program(f"import os\n{PROGRAMS['cheats'][name]}", TESTS, "f").passed


@pytest.mark.parametrize(
    "program",
    [
        "f = sorted",
        "import collections\ndef f(x): return type('L', (list,), {})(sorted(collections.Counter(x)))",
        "print('noise')\ndef f(x):\n  print(x)\n  return sorted(x)",
    ],
)
def test_tests_pass_with_a_solution(program: str) -> None:
    assert run_program(program, TESTS, "f") == runner.ProgramResult(True, "")


def test_values_keep_their_types() -> None:
    values = [None, True, 0, -1.5, 10**30, "\ud800\n'", b"\0", (1,), [()], {1, 2}, set(), {(1, 2): {"a": [None]}}, 2j]
    tests = f"for x in {values!r}: assert (candidate(x), type(candidate(x))) == (x, type(x))"
    assert run_program("def f(x): return x", tests, "f") == runner.ProgramResult(True, "")
    counter = "import collections\ndef f(x): return collections.Counter(x)"
    assert run_program(counter, "assert candidate('aab') == {'a': 2, 'b': 1}", "f").passed


@pytest.mark.parametrize("program", FORGERIES[::3])
def test_a_program_cannot_forge_that_it_could_not_be_confined(program: str) -> None:
    assert not run_program(program, TESTS, "f").passed


@pytest.mark.parametrize(("limit", "works"), [("-n 24", True), ("-f 100", True), ("-t 4", True), ("-v 50000", False)])
def test_lower_limits_of_the_shell_are_used_or_refused(limit: str, works: bool) -> None:
    code = "from nanochat.sandbox.runner import check_sandbox; check_sandbox()"
    shell = ["sh", "-c", f'ulimit {limit} && "$0" -S -c "{code}"', sys.executable]
    # scripts/env.sh makes malloc reserve more than the smallest limit.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(shell, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode == 0) == works, result.stderr
    assert works or ("UserError" in result.stderr and "ulimit" in result.stderr)


def test_a_kill_leaves_no_files_behind(tmp_path: Path) -> None:
    assert not leaves_files_when_killed(tmp_path, delay=0.0)


def test_noise_on_the_result_s_pipe_does_not_pass() -> None:
    every = "import os\nfor fd in range(3, 4096):\n  try: os.write(fd, b'0' * 40)\n  except OSError: pass"
    assert not run_program(every).passed
    assert not run_program("while True:\n  " + every.replace("\n", "\n  "), time_limit=0.5).passed


def test_programs_run_side_by_side() -> None:
    before = threading.active_count()  # of tests before this one some may still be ending
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run_program, ["x = 1", "assert False"] * 4))
    assert [result.passed for result in results] == [True, False] * 4
    assert threading.active_count() <= before


def test_where_the_kernel_protects_nothing_it_is_refused_unless_the_user_insists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jail, "landlock_version", lambda: 0)
    with pytest.raises(UserError, match=r"Landlock.*--unconfined-code"):
        run_program("x = 1")
    assert run_program("x = 1", unconfined=True).passed
    assert run_program("while True: pass", unconfined=True, time_limit=0.5).reason == "took longer than 0.5 seconds"
