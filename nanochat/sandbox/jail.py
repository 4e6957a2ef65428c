"""The processes inside the sandbox: one runs a program, the other tests it.

nanochat.sandbox.runner starts each as `python -I -S jail.py` with a JSON object on standard input. It imports only the
standard library, because the program can use everything that is imported here. In this order it limits

- memory, CPU time, file size and open files (rlimits), capabilities and new privileges,
- files: Python's own are readable, the program's folder is writable, nothing else
  (Landlock, https://docs.kernel.org/userspace-api/landlock.html),
- system calls: computing, files and threads are allowed (seccomp). The program cannot start, signal or trace a
  process, open a socket or change permissions.

Then it confirms this on standard output, before it reads any code. The tests call the program over a socket that
carries only literals, so the program sees neither the tests nor the objects that they compare.
"""

import ast
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
from typing import Any, TextIO

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Landlock's rights over files, one bit each. Versions 2, 3 and 5 added some.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}

CLONE, CLONE3, FCNTL = {"x86_64": (56, 435, 72), "aarch64": (220, 435, 25)}.get(platform.machine(), (0, 0, 0))
OPEN_CALLS = {"x86_64": {2: 24, 257: 32}, "aarch64": {56: 32}}.get(platform.machine(), {})
"""open and openat, with the offset of their flags in the data that seccomp sees."""
CLONE_THREAD = 0x10000
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15

CONFINED = b"confined\n"
PASSED = b"passed"
ENDED = "the program ended"
MAX_MESSAGE_CHARS = 4 << 20

libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Version of Landlock in the kernel, 0 if none."""
    libc.syscall.restype = ctypes.c_long
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def drop_capabilities() -> None:
    """Drop capabilities. Without them, root has only the rights of a normal user on its own files."""
    number = {"x86_64": 126, "aarch64": 91}[platform.machine()]
    _checked(libc.syscall(number, struct.pack("II", 0x20080522, 0), bytes(24)), "capset")


def confine_files(writable: str, version: int) -> None:
    """Landlock `version`: allow reading Python and the system libraries, and writing in `writable` unless empty."""
    all_rights = (1 << NUM_FILE_RIGHTS.get(version, 16)) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scopes = 0b11 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("QQQ", all_rights, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _checked(ruleset, "landlock_create_ruleset")
    python = sysconfig.get_paths()
    for path in (python["stdlib"], python["platstdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        _allow(ruleset, path, READ_FILE | READ_DIR | EXECUTE)
    if writable:
        _allow(ruleset, writable, all_rights & ~(EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK))
    for path in ("/dev/null", "/dev/urandom", "/dev/random"):
        _allow(ruleset, path, READ_FILE | (WRITE_FILE if path == "/dev/null" else 0))
    _checked(libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = struct.pack("=Qi", rights, descriptor)
    _checked(libc.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule for {path}")
    os.close(descriptor)


def allowed_system_calls() -> list[int]:
    """Numbers on this architecture of the calls in syscalls.txt."""
    column = 1 if platform.machine() == "x86_64" else 2
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "syscalls.txt")) as file:
        numbers = [line.split()[column] for line in file if not line.startswith("#")]
    return [int(number) for number in numbers if number != "-"]


def confine_system_calls(allowed: list[int]) -> None:
    """seccomp: permit `allowed`, threads but not processes, and fcntl without file owners (signals); else EPERM.

    Before version 3, Landlock does not check O_TRUNC, only the access mode, and O_RDONLY | O_TRUNC empties a file. So
    O_TRUNC needs a mode for writing. Mode 3 (ioctl only) needs no right of Landlock, and is refused.
    """
    load, equal, at_least, any_bit, bit_and, ret = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # operations of classic BPF
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    opens: list[tuple[int, int, int, int]] = []
    for call, flags in OPEN_CALLS.items():
        opens += [(equal, 0, 7, call), (load, 0, 0, flags), (bit_and, 0, 0, os.O_TRUNC | 3), (equal, 3, 0, os.O_TRUNC)]
        opens += [(equal, 2, 0, os.O_TRUNC | 3), (equal, 1, 0, 3), (ret, 0, 0, allow), (ret, 0, 0, deny)]
    program = [
        (load, 0, 0, 4),  # architecture: the numbers of the calls depend on it
        (equal, 1, 0, ARCHITECTURES[platform.machine()]),
        (ret, 0, 0, kill),
        (load, 0, 0, 0),  # number of the call
        (at_least, 0, 1, 0x40000000),  # x86_64's second set of numbers (x32)
        (ret, 0, 0, deny),
        (equal, 0, 1, CLONE3),  # its flags are in memory, out of reach; without it the C library uses clone
        (ret, 0, 0, missing),
        (equal, 0, 4, CLONE),
        (load, 0, 0, 16),  # the first argument
        (any_bit, 0, 1, CLONE_THREAD),
        (ret, 0, 0, allow),
        (ret, 0, 0, deny),
        (equal, 0, 6, FCNTL),
        (load, 0, 0, 24),  # the second argument
        (equal, 3, 0, F_SETOWN),
        (equal, 2, 0, F_SETSIG),
        (equal, 1, 0, F_SETOWN_EX),
        (ret, 0, 0, allow),
        (ret, 0, 0, deny),
        *opens,
        *((equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)),
        (ret, 0, 0, deny),
        (ret, 0, 0, allow),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(filter_program), 0, 0), "prctl(PR_SET_SECCOMP)")


def _checked(result: int, call: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def limit_resources(limits: dict[str, int]) -> None:
    """Set rlimits, such as {"CPU": 6}, or keep those of this shell that are lower."""
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def plain(value: Any) -> object:
    """Reduce containers to the built-in ones, whose repr is a literal."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    kind = next((kind for kind in (list, tuple, set) if isinstance(value, kind)), None)
    return kind(map(plain, value)) if kind else value


def run_program(program: str, name: str, calls: TextIO, answers: TextIO) -> None:
    """Run the program, then answer calls of its function `name`. Each message is a literal on one line."""
    try:
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(program, "<program>", "exec", dont_inherit=True), scope)
        print(("", None), file=answers)
        for call in calls:
            print(("", plain(scope[name](*ast.literal_eval(call)))), file=answers)
    except BaseException as error:
        print((f"{type(error).__name__}: {error}"[:300], None), file=answers)


def run_tests(tests: str, answers: TextIO, calls: TextIO) -> str:
    """Run tests that call the program as `candidate(...)`. Returns the reason of the failure, empty if they pass."""
    failure = ""

    def answer() -> object:
        nonlocal failure
        line = answers.readline(MAX_MESSAGE_CHARS)
        failure, value = ast.literal_eval(line) if line else (ENDED, None)
        if failure:
            raise ChildProcessError
        return value

    def candidate(*arguments: object) -> object:
        print(arguments, file=calls)
        return answer()

    try:
        answer()  # the program has run to its end
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), {"candidate": candidate})
    except BaseException as error:
        return failure or f"{type(error).__name__}: {error}"
    return failure


def main() -> None:
    """Confine this process and confirm it, then run the program, or the tests and report their outcome."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    task = json.load(sys.stdin)
    if os.getppid() != task["parent"]:
        os._exit(1)  # it ended before the signal was requested
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        limit_resources(task["limits"])
        if task["landlock"]:
            _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
            drop_capabilities()
            allowed = allowed_system_calls()  # not readable any more after confine_files
            confine_files("" if task["tests"] else os.getcwd(), task["landlock"])
            confine_system_calls(allowed)
    except (OSError, ValueError, KeyError) as error:
        os.write(report, str(error).encode())
        os._exit(1)
    os.write(report, CONFINED)
    with open(task["peer"]) as incoming, open(task["peer"], "w", buffering=1, closefd=False) as outgoing:
        if task["tests"]:
            failure = run_tests(task["tests"], incoming, outgoing)
            os.write(report, f"failed {failure}"[:300].encode(errors="replace") if failure else PASSED)
        else:
            os.close(report)  # the program never holds it
            run_program(task["program"], task["name"], incoming, outgoing)
        os._exit(0)  # no other thread and no exit handler of the program runs after this


if __name__ == "__main__":
    main()
