"""The system checks of ./nanochat.sh doctor: driver, memory, disk, suspend, compiler, network, time.

The quick ones run before every stage, in a tenth of a second and without torch.
"""

import importlib.util
import os
import re
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from nanochat import host, paths
from nanochat.host import DROP_CACHE, GPU, POWER_BRAKE, THERMAL, slowdown
from nanochat.units import format_bytes, format_gib

COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}
MARGIN = 21  # columns of status and name
CUDA_13_DRIVER = 580  # the first driver that runs CUDA 13, which the pinned torch is built for
MIN_DISK = 3e9
MAX_CACHE = 0.5
"""Fraction of a GB10's memory in the page cache that causes a warning, because CUDA cannot always reclaim it."""
MAX_SWAP = 2**30
NETWORK_SECONDS = 5.0
OLDEST_VBIOS = "9A.0B.25"
MASK_SLEEP = "sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target"
MORE_DISK = "free space, or set NANOCHAT_BASE_DIR to another disk"


@dataclass(frozen=True)
class Check:
    """One finding, with the command or advice that fixes it."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""


def run_checks(checks: Mapping[str, Callable[[], Check | None]]) -> list[Check]:
    """Run all checks; those that do not apply return None. An exception in a check becomes a warning."""
    found = []
    for name, check in checks.items():
        try:
            found.append(check())
        except Exception as error:  # the doctor must not stop a run
            found.append(Check(name, "warning", f"check failed ({type(error).__name__}: {error})"))
    return [check for check in found if check]


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """Print one line per check, wrapped to the console, with its fix below."""
    for check in checks:
        head = f"{check.status:<8}{check.name:<{MARGIN - 8}}"
        wrapper = textwrap.TextWrapper(max(console.width, 40), head, " " * MARGIN, break_on_hyphens=False)
        text = Text(wrapper.fill(check.text))
        text.stylize(COLORS[check.status], 0, len(check.status))
        console.print(text, soft_wrap=True)
        if check.fix:  # one line, so that it can be copied
            console.print(Text(" " * MARGIN + check.fix, "bold"), soft_wrap=True)


def quick_checks() -> list[Check]:
    """Run the checks that precede every stage."""
    gpus = host.gpus()  # once: a sleeping driver takes a second to answer
    return run_checks(
        {"GPU": lambda: driver(gpus), "firmware": lambda: firmware(gpus), "clocks": lambda: clocks(gpus),
         "memory": lambda: memory(gpus), "disk": disk, "suspend": suspend}
    )  # fmt: skip


def thorough_checks(gpus: list[GPU], needed_disk: float, purpose: str) -> list[Check]:
    """Run the checks that do not involve the GPU. `needed_disk`: bytes for `purpose`, such as "depth 20"."""
    return run_checks(
        {"firmware": lambda: firmware(gpus), "ptxas": lambda: ptxas(gpus), "compiler": lambda: compiler(gpus),
         "swap": swap, "disk": lambda: disk(needed_disk, purpose), "suspend": suspend, "network": network,
         "logins": logins, "time": clock}
    )  # fmt: skip


def driver(gpus: list[GPU]) -> Check:
    if not gpus:
        vendors = (host.root() / "sys/bus/pci/devices").glob("*/vendor")
        nvidia = [vendor.with_name("class") for vendor in vendors if host.read(str(vendor)) == "0x10de"]
        if any(host.read(str(kind)).startswith("0x03") for kind in nvidia):  # display or 3D controller
            fix = "sudo reboot; if that does not help, reinstall the driver"
            return Check("GPU", "failed", "NVIDIA device found, but nvidia-smi does not answer", fix)
        return Check("GPU", "ok", "none; a CPU is enough for small models (./demo.sh)")
    names = f"{len(gpus)} x {gpus[0].name}" if len(gpus) > 1 else gpus[0].name
    text = f"{names} (sm_{gpus[0].compute_cap.replace('.', '')}), driver {gpus[0].driver}"
    major = gpus[0].driver.split(".")[0]
    if not major.isdigit() or int(major) < CUDA_13_DRIVER:
        text += f": too old for CUDA 13, which needs {CUDA_13_DRIVER} or newer"
        return Check("GPU", "failed", text, "update it in the DGX Dashboard, or: sudo ubuntu-drivers install")
    return Check("GPU", "ok", text)


def clocks(gpus: list[GPU]) -> Check | None:
    if not gpus:
        return None
    throttled = [gpu for gpu in gpus if gpu.slowed_by & (THERMAL | POWER_BRAKE) or gpu.is_stuck]
    gpu = [*throttled, *gpus][0]
    figures = ((gpu.clock, "MHz"), (gpu.power, "W"), (gpu.temperature, "°C"))
    text = ", ".join(f"{value:.0f} {unit}" for value, unit in figures if value is not None) or "unknown to the driver"
    if throttled:
        state = "stuck in low power" if gpu.is_stuck else "throttled"
        return Check("clocks", "warning", f"{text}: the GPU is {state}", slowdown(gpu))
    return Check("clocks", "ok", text)


def firmware(gpus: list[GPU]) -> Check | None:
    """Firmware of a GB10 before OLDEST_VBIOS halves its speed."""
    versions = [gpu.vbios for gpu in gpus if gpu.is_gb10]
    old = [version for version in versions if version.count(".") >= 2 and version.split(".") < OLDEST_VBIOS.split(".")]
    if not old:
        return None
    fix = "sudo fwupdmgr refresh && sudo fwupdmgr update    # then reboot"
    return Check("firmware", "warning", f"VBIOS {old[0]} is older than {OLDEST_VBIOS}, which is twice as fast", fix)


def memory(gpus: list[GPU]) -> Check | None:
    memory = host.memory()
    if memory is None:
        return None
    unified = any(gpu.is_gb10 for gpu in gpus)
    text = (
        f"{format_gib(memory.available)} of {format_gib(memory.total)} available"
        f"{' for CPU and GPU' if unified else ''}, {format_gib(memory.page_cache)} in page cache"
    )
    if memory.available < 0.1 * memory.total:
        return Check("memory", "warning", text, "ps aux --sort=-rss | head    # lists the largest processes")
    if unified and memory.page_cache > MAX_CACHE * memory.total:
        return Check("memory", "warning", f"{text}, which the GPU may not get", DROP_CACHE)
    return Check("memory", "ok", text)


def swap() -> Check | None:
    """Swap in use, a sign that memory ran out before."""
    memory = host.memory()
    if memory is None:
        return None
    used = memory.swap_total - memory.swap_free
    text = f"{format_gib(used)} of {format_gib(memory.swap_total)} in use" if memory.swap_total else "none"
    if used > MAX_SWAP:
        return Check("swap", "warning", f"{text}: memory ran out before", "sudo swapoff -a && sudo swapon -a")
    return Check("swap", "ok", text)


def disk(needed: float = 0.0, purpose: str = "") -> Check:
    """Free disk space, compared with the `needed` bytes if given."""
    folder = paths.base_dir()
    free = shutil.disk_usage(folder).free
    text = f"{format_bytes(free)} free in {folder}"
    if needed:
        text += f"; {purpose} needs about {format_bytes(needed)}"
    status = "failed" if free < MIN_DISK else "warning" if free < needed else "ok"
    return Check("disk", status, text, "" if status == "ok" else MORE_DISK)  # type: ignore[arg-type]


def suspend() -> Check | None:
    """Warns if the desktop may suspend the machine during a run."""
    if not (host.root() / "run/systemd/system").exists():
        return None
    links = [host.root() / "etc/systemd/system" / unit for unit in ("suspend.target", "sleep.target")]
    if any(link.is_symlink() and os.readlink(link) == "/dev/null" for link in links):
        return Check("suspend", "ok", "masked")
    idle_action = re.search(r"^\s*IdleAction\s*=\s*(suspend|hibernate)", host.read("etc/systemd/logind.conf"), re.M)
    if host.output("systemctl", "get-default") != "graphical.target" and not idle_action:
        return Check("suspend", "ok", "no desktop that suspends the machine")
    inhibit = ("systemd-inhibit", "--what=sleep", "--who=nanochat", "--why=doctor", "true")
    if os.environ.get("NANOCHAT_STAY_AWAKE", "1") != "0" and host.output(*inhibit, seconds=3) is not None:
        return Check("suspend", "ok", "prevented during a run")
    return Check("suspend", "warning", "the desktop may suspend the machine during a run", MASK_SLEEP)


def ptxas(gpus: list[GPU]) -> Check | None:
    """The assembler that comes with Triton for chips since Blackwell, which needs no CUDA toolkit."""
    if not any(gpu.is_gb10 for gpu in gpus):
        return None
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent if triton and triton.origin else Path()
    bundled = folder / "backends/nvidia/bin/ptxas-blackwell"
    command = os.environ.get("TRITON_PTXAS_BLACKWELL_PATH") or str(bundled)
    if "sm_121" in (host.output(command, "--help") or ""):
        return Check("ptxas", "ok", "Triton's own supports sm_121")
    return Check(
        "ptxas", "warning", f"{command} does not support sm_121: no torch.compile", "rm -rf .venv && ./setup.sh"
    )


def compiler(gpus: list[GPU]) -> Check | None:
    if not gpus:
        return None
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if headers.exists() else ["Python headers"]
    missing += [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["C compiler"]
    if missing:
        return Check("compiler", "warning", f"{' and '.join(missing)} missing: no torch.compile", "./setup.sh")
    return Check("compiler", "ok", "C compiler and Python headers found")


def network() -> Check:
    import httpx2  # slow to load
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("network", "ok", "not checked: HF_HUB_OFFLINE is set")
    url, start = constants.ENDPOINT, time.perf_counter()
    try:
        httpx2.head(url, timeout=NETWORK_SECONDS, follow_redirects=True)
    except httpx2.HTTPError as error:
        text = f"{url} does not answer ({type(error).__name__}): downloads will fail"
        return Check("network", "warning", text, f"curl -I {url}")
    return Check("network", "ok", f"{url} answers in {(time.perf_counter() - start) * 1000:.0f} ms")


def logins() -> Check:
    """Logins to the hub and wandb, needed only for sharing and tracking."""
    from huggingface_hub import get_token  # slow to load

    from nanochat.telemetry.trackers import is_logged_in_to_wandb

    hub = "hub: logged in" if get_token() else "hub: not logged in (hf auth login, to share a model)"
    return Check("logins", "ok", f"{hub}; wandb: {'logged in' if is_logged_in_to_wandb() else 'not logged in'}")


def clock() -> Check:
    """Time and its synchronization, which certificates and logs depend on."""
    text = time.strftime("%Y-%m-%d %H:%M %Z (UTC%z)")
    if host.output("timedatectl", "show", "--property=NTPSynchronized", "--value") == "no":
        return Check("time", "warning", f"{text}, not synchronized", "sudo timedatectl set-ntp true")
    return Check("time", "ok", text)
