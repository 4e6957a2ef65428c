"""Check the connection between two machines: ssh, RoCE ports, frame size, all-reduce bandwidth.

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

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.host import SSH
from nanochat.spark.system import Check

READ_PORTS = """ip -json -4 address
cd "${NANOCHAT_ROOT:-}/sys/class" && grep -Hs . net/*/operstate net/*/mtu net/*/speed \\
  infiniband/*/ports/1/link_layer infiniband/*/ports/1/state infiniband/*/ports/1/gid_attrs/ndevs/0
true"""
"""Shell script that prints a host's addresses and ports; some files of a port that is down are unreadable."""
JUMBO_MTU = 9000
RAIL_MEGABITS = 100_000
"""A GB10 reaches each 200 Gb/s port of its ConnectX-7 over two PCIe links of half that speed, each an interface."""
ALL_REDUCE_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}
"""Half a GB, about as much as a model's gradients; less over TCP."""
ALL_REDUCE_REPEATS, WARMUP = 10, 2


@dataclass(frozen=True)
class Port:
    interface: str
    device: str  # RDMA device such as rocep1s0f0; empty without RDMA
    active: bool
    address: str  # such as 192.168.100.1/24; empty if it has none
    mtu: int
    megabits: int  # 0 if unknown

    @property
    def network(self) -> str:
        return str(ipaddress.ip_interface(self.address).network) if self.address else ""


def command_on(host: str, *command: str) -> list[str]:
    """A command that runs on `host`, over ssh unless that is this machine."""
    if host in ("localhost", socket.gethostname()):
        return list(command)
    return [*SSH, host, shlex.join(command)]


def ports_of(host: str) -> list[Port]:
    """The interfaces of a host that have an address or RoCE. Raises UserError if it does not answer over ssh."""
    try:
        command = command_on(host, "sh", "-c", READ_PORTS)
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"no answer ({error})") from None
    if result.returncode:
        raise UserError((result.stderr.strip().splitlines() or ["no answer"])[-1])
    return parse_ports(result.stdout)


def parse_ports(output: str) -> list[Port]:
    """Parse the output of READ_PORTS: one line of JSON with the addresses, then one `path:content` per line."""
    lines = output.splitlines()
    files = dict(line.split(":", 1) for line in lines if line.startswith(("infiniband/", "net/")))
    addresses = {
        link["ifname"]: f"{info['local']}/{info['prefixlen']}"
        for link in json.loads(next((line for line in lines if line.startswith("[")), "[]"))
        for info in link.get("addr_info", [])[:1]
        if link["ifname"] != "lo"
    }
    found = {name: ("", files.get(f"net/{name}/operstate") != "down") for name in addresses}
    for path, interface in files.items():
        folder = path.removesuffix("/gid_attrs/ndevs/0")
        if folder != path and files.get(f"{folder}/link_layer") == "Ethernet":
            found[interface] = folder.split("/")[1], files.get(f"{folder}/state", "").endswith("ACTIVE")
    ports = []
    for name, (device, active) in sorted(found.items()):
        mtu, speed = files.get(f"net/{name}/mtu", "0"), files.get(f"net/{name}/speed", "")  # -1 if it is down
        megabits = int(speed) if speed.isdigit() else 0
        ports.append(Port(name, device, active, addresses.get(name, ""), int(mtu), megabits))
    return ports


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
