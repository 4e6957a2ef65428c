"""Two machines as one: what lies between them, and whether it is fast enough to train over."""

import ipaddress
import json
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nanochat.spark import links
from nanochat.spark.checks import Check

JUMBO_MTU = 9000
RAIL_MEGABITS = 100_000
"""A GB10 reaches each port of its ConnectX-7 over two PCIe links, each an interface of its own, half the 200 Gb/s."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "StrictHostKeyChecking=accept-new")


@dataclass(frozen=True)
class Port:
    """A network interface of one host."""

    interface: str
    device: str
    """the RDMA device, such as rocep1s0f0; empty where it does no RDMA"""
    active: bool
    address: str
    """such as 192.168.100.1/24; empty where it has none"""
    mtu: int
    megabits: int
    """0 where the driver does not say"""

    @property
    def network(self) -> str:
        """The subnet of its address."""
        return str(ipaddress.ip_interface(self.address).network) if self.address else ""


def command_on(host: str, *command: str) -> list[str]:
    """A command that runs on `host`: there over ssh, here as it is."""
    if host in ("localhost", socket.gethostname()):
        return list(command)
    return [*SSH, host, shlex.join(command)]


def ports_of(host: str) -> list[Port] | str:
    """The host's ports; what went wrong where it cannot be asked. It needs ssh without a password, and Python."""
    command = command_on(host, "python3", "-")
    script = Path(links.__file__).read_text()
    try:
        result = subprocess.run(command, input=script, capture_output=True, text=True, timeout=30, check=False)
        return [Port(**port) for port in json.loads(result.stdout)["ports"]]
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    except (OSError, ValueError, KeyError):
        return result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no answer"


def shared_networks(first: list[Port], second: list[Port]) -> list[tuple[Port, Port]]:
    """Ports that can reach each other, being up in the same subnet; those with RDMA first, then the fastest."""
    pairs = [(a, b) for a in first for b in second if a.active and b.active and a.network and a.network == b.network]
    return sorted(pairs, key=lambda pair: (not (pair[0].device and pair[1].device), -pair[0].megabits))


def judge_link(first: list[Port], second: list[Port]) -> list[Check]:
    """What to say of the ports of two hosts: RoCE, both halves, frames."""
    pairs = shared_networks(first, second)
    if not pairs:
        text = "no two ports of theirs are up in the same subnet"
        return [Check("link", "failed", text, "docs/spark.md, 'Two Sparks': connect the cable, give addresses")]
    rails = [pair for pair in pairs if pair[0].device and pair[1].device]
    if not rails:
        a, b = pairs[0]
        text = f"{a.interface} ({a.address}) and {b.interface} ({b.address}), without RDMA: slow"
        return [Check("link", "warning", text, "ibdev2netdev    # is a port of the ConnectX-7 up, with an address?")]
    checks = []
    names = ", ".join(f"{a.interface} {a.address} to {b.address}" for a, b in rails)
    if len(rails) == 1 and rails[0][0].megabits <= 2 * RAIL_MEGABITS:
        text = f"{names}: one half of the port; the other half has no address in a subnet of its own"
        mend = "ip -brief address    # give the twin (enP2p1s0... beside enp1s0...) one on both, in another subnet"
        checks.append(Check("link", "warning", text, mend))
    else:
        checks.append(Check("link", "ok", f"RoCE over {names}"))
    small = sorted({f"{port.interface} ({port.mtu})" for pair in rails for port in pair if port.mtu < JUMBO_MTU})
    if small:
        mend = f"sudo ip link set dev {small[0].split()[0]} mtu {JUMBO_MTU}    # on both machines, each interface"
        checks.append(Check("MTU", "warning", f"{', '.join(small)}: small frames cost speed", mend))
    else:
        checks.append(Check("MTU", "ok", f"{JUMBO_MTU} on all of them"))
    return checks


def judge_bandwidth(gigabytes: float, over_rdma: bool) -> Check:
    """All-reduce between two Sparks, in GB/s of bus bandwidth: over 20 with both halves and large frames."""
    text = f"{gigabytes:.1f} GB/s"
    if not over_rdma:
        return Check("all-reduce", "ok", f"{text}, over TCP; two Sparks over RoCE reach 20")
    if gigabytes >= 20:
        return Check("all-reduce", "ok", text)
    if gigabytes >= 8:
        why = "as over one half of the port: see to the second one's address, and to the MTU"
    else:
        why = "NCCL is not on RoCE: NCCL_DEBUG=INFO tells what it took; unset NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
    return Check("all-reduce", "warning", f"{text}, and over 20 is to be had", why)
