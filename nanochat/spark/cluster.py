"""Checks the connection between two machines: ssh, RoCE ports, frame size, all-reduce bandwidth.

`python -m nanochat.spark.cluster` measures the all-reduce. It runs once per machine, with RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT set, and the main process prints the result as JSON.
"""

import ipaddress
import json
import os
import shlex
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.host import SSH
from nanochat.spark import ports
from nanochat.spark.checks import Check

JUMBO_MTU = 9000
RAIL_MEGABITS = 100_000
"""A GB10 reaches each port of its ConnectX-7 over two PCIe links of half its 200 Gb/s, each an interface."""
ALL_REDUCE_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}
"""Half a GB, about the gradients of a model; less over TCP."""
ALL_REDUCE_REPEATS, WARMUP = 10, 2


@dataclass(frozen=True)
class Port:
    """A network interface of one host."""

    interface: str
    device: str
    """RDMA device such as rocep1s0f0; empty without RDMA"""
    active: bool
    address: str
    """such as 192.168.100.1/24; empty if it has none"""
    mtu: int
    megabits: int
    """0 if unknown"""

    @property
    def network(self) -> str:
        """The subnet of the address."""
        return str(ipaddress.ip_interface(self.address).network) if self.address else ""


def command_on(host: str, *command: str) -> list[str]:
    """A command that runs on `host`, over ssh unless that is this machine."""
    if host in ("localhost", socket.gethostname()):
        return list(command)
    return [*SSH, host, shlex.join(command)]


def ports_of(host: str) -> list[Port]:
    """The ports of a host, which needs passwordless ssh and Python. Raises UserError with the reason of a failure."""
    script = Path(ports.__file__).read_text()
    try:
        command = command_on(host, "python3", "-")
        result = subprocess.run(command, input=script, capture_output=True, text=True, timeout=30, check=False)
        return [Port(**port) for port in json.loads(result.stdout)]
    except subprocess.TimeoutExpired:
        raise UserError("no answer in 30 s") from None
    except (OSError, ValueError, TypeError):
        raise UserError((result.stderr.strip().splitlines() or ["no answer"])[-1]) from None


def shared_networks(first: list[Port], second: list[Port]) -> list[tuple[Port, Port]]:
    """Pairs of active ports in the same subnet; those with RDMA first, then the fastest."""
    pairs = [(a, b) for a in first for b in second if a.active and b.active and a.network and a.network == b.network]
    return sorted(pairs, key=lambda pair: (not (pair[0].device and pair[1].device), -pair[0].megabits))


def check_link(first: list[Port], second: list[Port]) -> list[Check]:
    """Check the ports of two hosts: RoCE, both halves of the port, frame size."""
    pairs = shared_networks(first, second)
    if not pairs:
        fix = "docs/spark.md, 'Two Sparks': connect the cable, set addresses"
        return [Check("link", "failed", "no two active ports in the same subnet", fix)]
    rails = [pair for pair in pairs if pair[0].device and pair[1].device]
    if not rails:
        a, b = pairs[0]
        text = f"{a.interface} ({a.address}) and {b.interface} ({b.address}), without RDMA: slow"
        return [Check("link", "warning", text, "ibdev2netdev    # is a port of the ConnectX-7 up, with an address?")]
    names = ", ".join(f"{a.interface} {a.address} to {b.address}" for a, b in rails)
    link = Check("link", "ok", f"RoCE over {names}")
    if len(rails) == 1 and rails[0][0].megabits <= 2 * RAIL_MEGABITS:
        text = f"{names}: one half of the port; the other half has no address in another subnet"
        fix = "ip -brief address    # set one for the twin (enP2p1s0... of enp1s0...) on both machines"
        link = Check("link", "warning", text, fix)
    small = sorted({f"{port.interface} ({port.mtu})" for pair in rails for port in pair if port.mtu < JUMBO_MTU})
    if not small:
        return [link, Check("MTU", "ok", f"{JUMBO_MTU} on all interfaces")]
    fix = f"sudo ip link set dev {small[0].split()[0]} mtu {JUMBO_MTU}    # on both machines, each interface"
    return [link, Check("MTU", "warning", f"{', '.join(small)}: small frames are slow", fix)]


def check_bandwidth(gbps: float, over_rdma: bool) -> Check:
    """Compare the all-reduce bandwidth of two Sparks, in GB/s, with what both halves and jumbo frames reach."""
    text = f"{gbps:.1f} GB/s"
    if not over_rdma:
        return Check("all-reduce", "ok", f"{text} over TCP; two Sparks over RoCE reach 20")
    if gbps >= 20:
        return Check("all-reduce", "ok", text)
    fix = "NCCL does not use RoCE: unset NCCL_IB_HCA and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO shows its choice"
    if gbps >= 8:
        fix = "as over one half of the port: check the second half's address, and the MTU"
    return Check("all-reduce", "warning", f"{text}; two Sparks should reach 20 or more", fix)


def measure_all_reduce() -> dict[str, float | str]:
    """Measure bus bandwidth, bytes per second that each machine sends and receives, as nccl-tests define it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend)
    world_size = dist.get_world_size()
    tensor = torch.ones(ALL_REDUCE_BYTES[device] // 4, device=device)
    seconds = []
    for _ in range(WARMUP + ALL_REDUCE_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    expected = float(world_size) ** (WARMUP + ALL_REDUCE_REPEATS)
    if tensor[0].item() != expected or tensor[-1].item() != expected:
        raise RuntimeError(f"wrong sum over {world_size} machines: {tensor[0].item()}, not {expected}")
    dist.destroy_process_group()
    moved = 2 * (world_size - 1) / world_size * tensor.nbytes
    return {"gbps": moved / statistics.median(seconds[WARMUP:]) / 1e9, "backend": backend}


if __name__ == "__main__":
    bandwidth = measure_all_reduce()
    if os.environ["RANK"] == "0":
        print(json.dumps(bandwidth))
