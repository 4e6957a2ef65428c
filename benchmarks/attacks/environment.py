"""Odd environments: every variable that the project reads, locales, proxies, no home, a read-only base directory."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.attacks.files import NUM_PROCESSES, make_sound_folder, problem_in

TRIES = 60
MAX_SECONDS = 120.0  # starting takes a few, many more on a busy machine
NUMBERS = (
    "NANOCHAT_WATTS", "NANOCHAT_PRICE_PER_KWH", "OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "COLUMNS", "LINES",
)  # fmt: skip
PLACES = (
    "HOME", "TMPDIR", "NANOCHAT_BASE_DIR", "NANOCHAT_ROOT", "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME",
    "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SSL_CERT_FILE", "TRITON_PTXAS_PATH",
)  # fmt: skip
WORDS = (
    "LC_ALL", "LANG", "PYTHONIOENCODING", "TERM", "TZ", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_TOKEN",
    "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NANOCHAT_API_KEY", "NANOCHAT_FOUND",
    "NANOCHAT_HOST", "NANOCHAT_DEMO", "NANOCHAT_STAY_AWAKE", "WANDB_MODE", "WANDB_API_KEY", "MPLBACKEND",
    "PYTORCH_ALLOC_CONF", "TORCH_LOGS", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "PATH",
)  # fmt: skip
VALUES = {
    NUMBERS: ("", " ", "x", "-1", "0", "1.5", "1e999", "nan", "9" * 5000, "\udc80"),
    PLACES: ("", "/nowhere/at/all", "/dev/null", "~nobody-here/x", "a b", "\udc80", "x" * 5000, "/proc/self"),
    WORDS: ("", " ", "x", "C", "POSIX", "xx_YY.UTF-99", "\udc80", "socks9://[", "ascii", "http://127.0.0.1:1", "a\nb"),
}
IMPORT = """
from nanochat import cli
from nanochat.data import download
from scripts import import_hf
download.MAX_FAILURES = 0
cli.run(import_hf.main, import_hf.Options, args=["ada/nanochat"])
"""
CHAT = ("-m", "scripts.chat_cli", "-p", "Hi", "--max-tokens", "2", "--device-type", "cpu")
COMMANDS = (
    ("-m", "scripts.plan", "--depth", "4"),
    ("-m", "scripts.checkpoints"),
    ("-m", "scripts.report"),
    ("-m", "scripts.launch", "1", "scripts.checkpoints"),
    ("-c", IMPORT),
    CHAT,
)


def environment(folder: Path, tries: int = TRIES, seed: int = 0) -> Iterator[tuple[str, bool]]:
    """Run commands with one variable set to an odd value, and in a read-only base directory.

    An attack succeeds if a command prints a traceback, hangs, or fails without one line.
    """
    base = make_sound_folder(folder) / "base"
    rng = random.Random(seed)
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        results: dict[str, Future[str | None]] = {}
        for number in range(tries):
            names = rng.choice(list(VALUES))
            name, value = rng.choice(names), rng.choice(VALUES[names])
            command = COMMANDS[number % len(COMMANDS)]
            label = f"{number}: {name}={value[:30]!r} {command[1][:20]}"
            results[label] = pool.submit(run_with, {name: value}, base, command)
        for command in (("-m", "scripts.checkpoints"), ("-m", "scripts.report"), CHAT):
            results[f"read-only {command[1]}"] = pool.submit(run_with, {}, base, command, read_only=True)
        for label, result in results.items():
            problem = result.result()
            yield f"{label}: {problem}", problem is not None


def run_with(variables: dict[str, str], base: Path, command: tuple[str, ...], read_only: bool = False) -> str | None:
    """Run Python with these arguments; return what went wrong, None if nothing did."""
    arguments = [sys.executable, *command]
    if read_only:  # also for root, who may write to every folder of a file system that is not read-only
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        arguments = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(base), *arguments]
    defaults = {"NANOCHAT_BASE_DIR": str(base), "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(base.parent / "hf")}
    try:
        result = subprocess.run(
            arguments, env=os.environ | defaults | variables, capture_output=True, stdin=subprocess.DEVNULL,
            timeout=MAX_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took over {MAX_SECONDS:.0f} s"
    return problem_in(result.returncode, (result.stdout + result.stderr).decode(errors="replace"))
