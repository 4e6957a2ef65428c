"""How fast gradients are summed between machines: torch's own all-reduce, NCCL on GPUs, gloo on CPUs.

Started once on each machine, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; the first prints GB/s as JSON.
"""

import json
import os
import statistics
import time

import torch
import torch.distributed as dist

SIZE = {"cuda": 1 << 29, "cpu": 1 << 26}
"""Bytes summed at a time: half a GB, of the order of a model's gradients; less where there is only TCP."""
REPEATS = 10


def measure() -> dict[str, float | str]:
    """Bus bandwidth: bytes that each machine sends and receives, per second, as nccl-tests count them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend)
    world_size = dist.get_world_size()
    tensor = torch.ones(SIZE[device] // 4, device=device)
    seconds = []
    for _ in range(REPEATS + 2):  # the first two make connections
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    expected = float(world_size) ** (REPEATS + 2)
    if tensor[0].item() != expected or tensor[-1].item() != expected:
        raise RuntimeError(f"the sum over {world_size} machines is wrong: {tensor[0].item()}, not {expected}")
    dist.destroy_process_group()
    moved = 2 * (world_size - 1) / world_size * tensor.nbytes
    return {"gigabytes_per_second": moved / statistics.median(seconds[2:]) / 1e9, "backend": backend}


if __name__ == "__main__":
    result = measure()
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
