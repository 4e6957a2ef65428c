"""What else a run depends on: swap, room for the depth planned, tools, network, logins, the clock on the wall."""

import os
import shutil
import sysconfig
import time
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_token

from nanochat import host, paths
from nanochat.host import GPU
from nanochat.spark.checks import Check
from nanochat.telemetry.trackers import is_logged_in_to_wandb

NETWORK_SECONDS = 5.0
MUCH_SWAPPED = 2**30


def swap() -> Check | None:
    """Swap in use means that memory ran out before."""
    memory = host.memory()
    if memory is None:
        return None
    used = memory.swap_total - memory.swap_free
    text = f"{used / 2**30:.1f} of {memory.swap_total / 2**30:.0f} GiB in use"
    if used > MUCH_SWAPPED:
        return Check("swap", "warning", f"{text}: memory ran out before", "sudo swapoff -a && sudo swapon -a")
    return Check("swap", "ok", text if memory.swap_total else "none")


def toolkit(gpus: list[GPU]) -> Check | None:
    """nvcc 13 and its ptxas: a GB10 needs them, since the ptxas inside Triton may not know its sm_121."""
    if not any(gpu.is_gb10 for gpu in gpus):
        return None
    ptxas = os.environ.get("TRITON_PTXAS_PATH")
    if ptxas and Path(ptxas).exists():
        return Check("CUDA toolkit", "ok", f"Triton uses {ptxas}")
    return Check("CUDA toolkit", "warning", "no ptxas of CUDA 13, which Triton needs for this chip", "./setup.sh")


def compiler(gpus: list[GPU]) -> Check | None:
    """A C compiler and Python's headers, with which Triton starts its kernels."""
    if not gpus:
        return None
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if headers.exists() else ["Python's headers"]
    missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["a C compiler"]
    if missing:
        return Check("compiler", "warning", f"{' and '.join(missing)} missing: no torch.compile", "./setup.sh")
    return Check("compiler", "ok", "a C compiler and Python's headers")


def room(needed: float, purpose: str) -> Check:
    """Room on disk for what is planned. `needed`: bytes."""
    folder = paths.base_dir()
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.0f} GB free in {folder}; {purpose} takes about {needed / 1e9:,.0f}"
    if free < needed:
        return Check("disk", "warning", text, "make room, or set NANOCHAT_BASE_DIR to another disk")
    return Check("disk", "ok", text)


def network() -> Check:
    """Whether the hub answers."""
    if constants.HF_HUB_OFFLINE:
        return Check("network", "ok", "not asked: HF_HUB_OFFLINE is set")
    address = constants.ENDPOINT
    try:
        begun = time.perf_counter()
        httpx2.head(address, timeout=NETWORK_SECONDS, follow_redirects=True)
    except httpx2.HTTPError as error:
        text = f"{address} does not answer ({type(error).__name__}): no data can be fetched"
        return Check("network", "warning", text, f"curl -I {address}")
    return Check("network", "ok", f"{address} answers in {(time.perf_counter() - begun) * 1000:.0f} ms")


def logins() -> Check:
    """Who is logged in; nothing but sharing and tracking needs it."""
    hub = "logged in to the hub" if get_token() else "not logged in to the hub (hf auth login, to share a model)"
    wandb = "to wandb" if is_logged_in_to_wandb() else "not to wandb"
    return Check("logins", "ok", f"{hub}; {wandb}")


def clock() -> Check:
    """Time zone and whether the clock is set by the network: times in logs, and certificates, depend on it."""
    text = time.strftime("%Y-%m-%d %H:%M %Z (UTC%z)")
    if host.output("timedatectl", "show", "--property=NTPSynchronized", "--value") == "no":
        return Check("time", "warning", f"{text}, not set by the network", "sudo timedatectl set-ntp true")
    return Check("time", "ok", text)
