"""The inside of the sandbox: a script that gives up its rights and then runs a program.

Run by nanochat.sandbox.runner as `python -I -S jail.py`, with a JSON object on standard input; imports nothing but the
standard library, for everything imported here lies open to the program. What it gives up, in this order:

- memory, CPU time, file size and open files beyond a limit (rlimits), capabilities, and gaining new privileges;
- every file but Python's own, for reading, and the current folder (Landlock,
  https://docs.kernel.org/userspace-api/landlock.html);
- every system call but those that a program needs which only computes, with files and threads (seccomp): no process
  can be started, signalled or traced, no socket opened, no permission changed.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")

# Landlock's rights over files, by the bit; the number of them grew with its versions 1, 2, 3 and 5.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
LATEST_NUM_FILE_RIGHTS = 16
BIND_TCP_AND_CONNECT_TCP = 0b11
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

# The system calls that are allowed: name, number on x86_64, number on aarch64 (- where it has none).
SYSCALLS = """
read 0 63, write 1 64, open 2 -, openat 257 56, close 3 57, close_range 436 436, lseek 8 62,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69, pwritev 296 70,
stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, ioctl 16 29, fsync 74 82, fdatasync 75 83,
ftruncate 77 46, fadvise64 221 223, sendfile 40 71, copy_file_range 326 285, getdents64 217 61, getcwd 79 17,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78, umask 95 166,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, membarrier 324 283,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigtimedwait 128 137, rt_sigpending 127 136,
rt_sigsuspend 130 133, sigaltstack 131 132, restart_syscall 219 128, pause 34 -, alarm 37 -, setitimer 38 103,
getitimer 36 102, futex 202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, sched_yield 24 124,
sched_getaffinity 204 123, exit 60 93, exit_group 231 94, arch_prctl 158 -,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, times 100 153,
getrusage 98 165, getcpu 309 168, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
nanosleep 35 101, gettimeofday 96 169, time 201 -, getrandom 318 278, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19
"""
CLONE, CLONE3, FCNTL = {"x86_64": (56, 435, 72), "aarch64": (220, 435, 25)}.get(platform.machine(), (0, 0, 0))
CLONE_THREAD = 0x10000
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15

libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The version of Landlock that the kernel offers, 0 if none."""
    libc.syscall.restype = ctypes.c_long
    return max(0, libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def limit_resources(memory_bytes: int, seconds: int, file_bytes: int, open_files: int) -> None:
    """Set the rlimits, for good."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def drop_capabilities() -> None:
    """Root without capabilities is a user like others, but for the files that it owns."""
    header, none = struct.pack("II", 0x20080522, 0), bytes(24)
    number = {"x86_64": 126, "aarch64": 91}[platform.machine()]
    _checked(libc.syscall(number, header, none), "capset")


def confine_files(writable: str) -> None:
    """Landlock: read Python and the system's libraries, write below `writable`, and nothing else."""
    version = landlock_version()
    if version < 1:
        raise OSError("the kernel offers no Landlock")
    every = (1 << NUM_FILE_RIGHTS.get(version, LATEST_NUM_FILE_RIGHTS)) - 1
    network = BIND_TCP_AND_CONNECT_TCP if version >= 4 else 0
    scopes = ABSTRACT_SOCKETS_AND_SIGNALS if version >= 6 else 0
    attributes = struct.pack("QQQ", every, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _checked(ruleset, "landlock_create_ruleset")
    python = sysconfig.get_paths()
    for path in (python["stdlib"], python["platstdlib"], *LIBRARY_FOLDERS):
        _allow(ruleset, path, READ_FILE | READ_DIR | EXECUTE)
    _allow(ruleset, writable, every & ~(EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK))
    for path in ("/dev/null", "/dev/urandom", "/dev/random"):
        _allow(ruleset, path, READ_FILE | (WRITE_FILE if path == "/dev/null" else 0))
    _checked(libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = struct.pack("=Qi", rights, at)
    _checked(libc.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule for {path}")
    os.close(at)


def confine_system_calls() -> None:
    """seccomp: the calls listed above; threads, but no processes; no owner for a file's signals. Else EPERM."""
    column = 1 if platform.machine() == "x86_64" else 2
    numbers = [fields[column] for call in SYSCALLS.replace("\n", " ").split(",") if (fields := call.split())]
    allowed = [int(number) for number in numbers if number != "-"]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of classic BPF
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    program = [
        (load, 0, 0, 4),  # the architecture: another one numbers the calls otherwise
        (equal, 1, 0, ARCHITECTURES[platform.machine()]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # x86_64's second set of numbers
        (give, 0, 0, refuse),
        (equal, 0, 1, CLONE3),  # its flags are in memory, out of reach; the C library then takes clone
        (give, 0, 0, absent),
        (equal, 0, 4, CLONE),
        (load, 0, 0, 16),  # the first argument
        (any_bit, 0, 1, CLONE_THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
        (equal, 0, 6, FCNTL),
        (load, 0, 0, 24),  # the second argument
        (equal, 3, 0, F_SETOWN),
        (equal, 2, 0, F_SETSIG),
        (equal, 1, 0, F_SETOWN_EX),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
        *((equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(filter_program), 0, 0), "prctl(PR_SET_SECCOMP)")


def _checked(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def main() -> None:
    """Confine this process, run the program, and say on the first standard output how it ended."""
    task = json.load(sys.stdin)
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    limit_resources(task["memory_bytes"], task["cpu_seconds"], task["file_bytes"], task["open_files"])
    if task["confine"]:
        try:
            _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
            drop_capabilities()
            confine_files(os.getcwd())
            confine_system_calls()
        except (OSError, KeyError) as error:
            os.write(result, f"{task['token']} {error}".encode())
            os._exit(1)
    # The program may find the token in this frame: it is against an exit() that passes for success, not against guile.
    try:
        program = compile(task["program"], "<program>", "exec", dont_inherit=True)
        exec(program, {"__name__": "__main__"})
    except BaseException as error:
        os.write(result, f"failed {type(error).__name__}: {error}"[:300].encode(errors="replace"))
        os._exit(1)
    # Threads that still run end here, and no exit handler of the program's speaks after it.
    os.write(result, task["token"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
