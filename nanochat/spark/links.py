"""This machine's network ports, as JSON. Nothing but the standard library: it is sent to the other machine as text.

ssh spark-b python3 - <nanochat/machine/links.py
"""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("NANOCHAT_ROOT") or "/")


def read(path: Path) -> str:
    """A file's text without the newline; empty where it cannot be read, as `speed` of a port that is down."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def addresses() -> "dict[str, str]":
    """IPv4 address and prefix length of each interface that has one, such as 192.168.100.1/24."""
    try:
        result = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, text=True, timeout=10)
        links = json.loads(result.stdout or "[]")
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return {
        link["ifname"]: f"{info['local']}/{info['prefixlen']}"
        for link in links
        for info in link.get("addr_info", [])[:1]
        if link["ifname"] != "lo"
    }


def rdma_devices() -> "dict[str, tuple[str, bool]]":
    """For each interface that does RDMA over Ethernet (RoCE): the device's name, as NCCL knows it, and if it is up."""
    devices = {}
    for port in sorted(ROOT.glob("sys/class/infiniband/*/ports/1")):
        interface = read(port / "gid_attrs/ndevs/0")
        if interface and read(port / "link_layer") == "Ethernet":
            devices[interface] = (port.parent.parent.name, read(port / "state").endswith("ACTIVE"))
    return devices


def facts() -> "dict[str, Any]":
    """The host's name and its ports."""
    found = addresses()
    devices = rdma_devices()
    ports = []
    for interface in sorted({*found, *devices}):
        folder = ROOT / "sys/class/net" / interface
        device, active = devices.get(interface, ("", read(folder / "operstate") != "down"))
        speed = read(folder / "speed")
        ports.append(
            {
                "interface": interface,
                "device": device,
                "active": active,
                "address": found.get(interface, ""),
                "mtu": int(read(folder / "mtu") or 0),
                "megabits": int(speed) if speed.isdigit() else 0,
            }
        )
    return {"host": platform.node(), "ports": ports}


if __name__ == "__main__":
    print(json.dumps(facts()))
