"""What a stage script looks at before it begins: what would stop a run of days. A tenth of a second, no torch."""

import os
import re
import shutil

from nanochat import host, paths
from nanochat.host import GPU, POWER_BRAKE, THERMAL
from nanochat.spark.checks import Check, run_checks
from nanochat.telemetry.alerts import DROP_CACHE, slowdown

CUDA_13_DRIVER = 580
"""The first driver that runs CUDA 13, which the pinned torch is built for."""
LITTLE_DISK = 3e9
BIG_CACHE = 0.5
"""Share of a GB10's memory in the page cache, above which it is worth saying: CUDA does not always get it back."""
MASK_SLEEP = "sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target"


def quick_checks() -> list[Check]:
    """All of them."""
    gpus = host.gpus()  # asked once: a driver that is asleep takes a second to answer
    return run_checks(
        {
            "GPU": lambda: gpu(gpus),
            "clocks": lambda: clocks(gpus),
            "memory": lambda: memory(gpus),
            "disk": disk,
            "suspend": suspend,
        }
    )


def gpu(gpus: list[GPU]) -> Check:
    """The GPU and its driver."""
    if not gpus:
        if _is_on_the_bus():
            text = "there is one by NVIDIA, and nvidia-smi does not answer"
            return Check("GPU", "failed", text, "sudo reboot; if that does not help, reinstall the driver")
        return Check("GPU", "ok", "none; the CPU does for small models (./demo.sh)")
    names = f"{len(gpus)} x {gpus[0].name}" if len(gpus) > 1 else gpus[0].name
    text = f"{names} (sm_{gpus[0].compute_cap.replace('.', '')}), driver {gpus[0].driver}"
    if _major(gpus[0].driver) < CUDA_13_DRIVER:
        text += f": too old for CUDA 13, which takes {CUDA_13_DRIVER} or newer"
        return Check("GPU", "failed", text, "update it in the DGX Dashboard, or: sudo ubuntu-drivers install")
    return Check("GPU", "ok", text)


def clocks(gpus: list[GPU]) -> Check | None:
    """Whether the GPU is held back now."""
    if not gpus:
        return None
    held_back = [gpu for gpu in gpus if gpu.slowed_by & (THERMAL | POWER_BRAKE)]
    shown = held_back[0] if held_back else gpus[0]
    figures = [
        f"{value:.0f} {unit}"
        for value, unit in ((shown.clock, "MHz"), (shown.power, "W"), (shown.temperature, "°C"))
        if value is not None
    ]
    text = ", ".join(figures) or "not told by the driver"
    if held_back:
        return Check("clocks", "warning", f"{text}: the GPU is held back", slowdown(shown))
    return Check("clocks", "ok", text)


def memory(gpus: list[GPU]) -> Check | None:
    """What is free, of a memory that a GB10's GPU shares."""
    memory = host.memory()
    if memory is None:
        return None
    unified = any(gpu.is_gb10 for gpu in gpus)
    total, available, cache = (size / 2**30 for size in (memory.total, memory.available, memory.page_cache))
    text = f"{available:.0f} of {total:.0f} GiB free{' for CPU and GPU' if unified else ''}, {cache:.0f} in page cache"
    if memory.available < 0.1 * memory.total:
        return Check("memory", "warning", text, "ps aux --sort=-rss | head    # what uses it; end what you can")
    if unified and memory.page_cache > BIG_CACHE * memory.total:
        return Check("memory", "warning", f"{text}, which the GPU may not get", DROP_CACHE)
    return Check("memory", "ok", text)


def disk() -> Check:
    """Whether the disk is about to be full."""
    folder = paths.base_dir()
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.0f} GB free in {folder}"
    if free < LITTLE_DISK:
        return Check("disk", "failed", text, "make room, or set NANOCHAT_BASE_DIR to another disk")
    return Check("disk", "ok", text)


def suspend() -> Check | None:
    """Whether the machine may go to sleep in the middle of a run."""
    if not (host.root() / "run/systemd/system").exists():
        return None
    if _is_masked("suspend.target") or _is_masked("sleep.target"):
        return Check("suspend", "ok", "masked: it stays awake")
    if host.output("systemctl", "get-default") != "graphical.target" and not _sleeps_when_idle():
        return Check("suspend", "ok", "no desktop that would put it to sleep")
    if os.environ.get("NANOCHAT_STAY_AWAKE", "1") != "0" and _can_inhibit():
        return Check("suspend", "ok", "the desktop may suspend it, but a run holds it awake while it lasts")
    return Check("suspend", "warning", "the desktop may suspend it in the middle of a run", MASK_SLEEP)


def _is_on_the_bus() -> bool:
    """Whether NVIDIA made a display or 3D controller among the PCI devices."""
    devices = (host.root() / "sys/bus/pci/devices").glob("*/vendor")
    return any(
        host.read(str(vendor)) == "0x10de" and host.read(str(vendor.with_name("class"))).startswith("0x03")
        for vendor in devices
    )


def _is_masked(unit: str) -> bool:
    """A masked unit is a link to /dev/null."""
    link = host.root() / "etc/systemd/system" / unit
    return link.is_symlink() and os.readlink(link) == "/dev/null"


def _sleeps_when_idle() -> bool:
    return bool(re.search(r"^\s*IdleAction\s*=\s*(suspend|hibernate)", host.read("etc/systemd/logind.conf"), re.M))


def _can_inhibit() -> bool:
    return (
        host.output("systemd-inhibit", "--what=sleep", "--who=nanochat", "--why=doctor", "true", seconds=3) is not None
    )


def _major(version: str) -> int:
    number = version.split(".")[0]
    return int(number) if number.isdigit() else 0
