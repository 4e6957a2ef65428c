"""Prints this machine's network ports as JSON. Standard library only: its source is sent to the other machine.

ssh spark-b python3 - <nanochat/spark/ports.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("NANOCHAT_ROOT") or "/")


def read(path: Path) -> str:
    """A file's text, stripped; empty if unreadable, as `speed` of a port that is down."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def addresses() -> "dict[str, str]":
    """IPv4 address and prefix length per interface, such as 192.168.100.1/24."""
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


def ports() -> "list[dict[str, Any]]":
    """All interfaces that have an address or RDMA over Ethernet (RoCE), with the fields of cluster.Port."""
    known = addresses()
    found: dict[str, dict[str, Any]] = {
        interface: {"device": "", "active": read(ROOT / f"sys/class/net/{interface}/operstate") != "down"}
        for interface in known
    }
    for port in sorted(ROOT.glob("sys/class/infiniband/*/ports/1")):
        interface = read(port / "gid_attrs/ndevs/0")
        if interface and read(port / "link_layer") == "Ethernet":
            found[interface] = {"device": port.parts[-3], "active": read(port / "state").endswith("ACTIVE")}
    for interface, fields in found.items():
        speed, mtu = (read(ROOT / f"sys/class/net/{interface}/{name}") for name in ("speed", "mtu"))
        fields |= {"interface": interface, "address": known.get(interface, ""), "mtu": int(mtu or 0)}
        fields["megabits"] = int(speed) if speed.isdigit() else 0
    return [found[interface] for interface in sorted(found)]


if __name__ == "__main__":
    print(json.dumps(ports()))
