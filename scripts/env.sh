# shellcheck shell=bash
# What every script starts with: `source` it, then `launch MODULE "$@"` or `exec python -m MODULE "$@"`.
# It makes .venv when that is missing or out of date, puts it and this project first, and says where things are kept.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"

export NANOCHAT_COMMAND="./${0##*/}" # what --help calls itself
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
if ! mkdir -p "$NANOCHAT_BASE_DIR" 2>/dev/null || ! [[ -w "$NANOCHAT_BASE_DIR" ]]; then
  echo "error: cannot write to $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR to a folder you can write to" >&2
  exit 2
fi

"$root/setup.sh" --quiet

# Not .venv/bin/activate, which names the folder that .venv was made in and so breaks when the project is moved.
export VIRTUAL_ENV="$root/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"

# The project's packages are found here and the caller's folder is not searched, so that scripts run from anywhere:
# relative paths in the options mean what they say, and a folder `scripts` over there does not hide ours.
export PYTHONPATH="$root"
export PYTHONSAFEPATH=1

# Compiled kernels outlive a reboot, which /tmp, the default, does not: compiling takes minutes on a GPU.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$NANOCHAT_BASE_DIR/cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$NANOCHAT_BASE_DIR/cache/triton}"

# CUDA's allocator then grows its segments instead of adding new ones: training, sampling and evaluation take turns with
# blocks of different sizes, and fixed segments fragment until a step that fits no longer does. On unified memory what
# is lost to fragments is lost to the CPU as well. The older name of the variable is left to have its say.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then
  export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

# shellcheck source=scripts/cuda.sh
source "$root/scripts/cuda.sh"

# found NAME VALUE: set what was found out about this machine, unless it is set already. Which were set is kept, since
# they are no business of another machine that takes part in a run.
found() {
  if [[ -z "${!1:-}" ]]; then
    export "$1=$2" NANOCHAT_FOUND="${NANOCHAT_FOUND:+$NANOCHAT_FOUND,}$1"
  fi
}

# The GB10's 20 cores are 10 fast and 10 slow ones, and a parallel loop ends with its slowest thread: one thread for
# each fast core. Linux tells of kinds (cpu_capacity) only where there are several; the slow have about 0.7 of the fast.
fast_cores="$(cat "${NANOCHAT_ROOT:-}"/sys/devices/system/cpu/cpu[0-9]*/cpu_capacity 2>/dev/null |
  awk '{ capacity[NR] = $1; if ($1 > most) most = $1 }
       END { for (i in capacity) fast += capacity[i] >= 0.85 * most; if (fast < NR) print fast }')" || true
if [[ -n "$fast_cores" ]]; then found OMP_NUM_THREADS "$fast_cores"; fi

# OpenMP's threads sleep sooner while they wait for one another: alone on the machine training is as fast as with the
# default of 300,000 turns of a loop, beside one busy process 1.15 times faster (docs/experiments.md).
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

# Where a CPU computes, glibc takes blocks of up to 32 MB from its heap and keeps up to 1 GB free at the end of that,
# instead of giving memory back to the kernel and having every page of it filled with zeros anew: a training step had
# 90,000 page faults and took 9% longer (docs/experiments.md). A GPU's activations are not in that memory.
if ! compgen -G "${NANOCHAT_ROOT:-}/dev/nvidia[0-9]*" >/dev/null; then
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # the most that glibc takes
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
fi

# Two Sparks talk over RoCE: NCCL is told the ports of the ConnectX-7 that are up and have an address, both halves of
# each (a GB10 reaches one port over two PCIe links, of 100 Gb/s each), or it may take the slow network. Where there is
# no such port nothing is set.
roce_devices="" roce_interfaces=""
for port in "${NANOCHAT_ROOT:-}"/sys/class/infiniband/*/ports/1; do
  interface="$(cat "$port/gid_attrs/ndevs/0" 2>/dev/null)" || continue
  [[ "$(<"$port/link_layer")" == Ethernet && "$(<"$port/state")" == *ACTIVE ]] || continue
  [[ -n "$(ip -oneline -4 address show dev "$interface" 2>/dev/null)" ]] || continue
  device="${port%/ports/1}"
  roce_devices+="${roce_devices:+,}${device##*/}"
  roce_interfaces+="${roce_interfaces:+,}$interface"
done
if [[ -n "$roce_devices" ]]; then # "=": these names, not all that begin with them
  found NCCL_IB_HCA "=$roce_devices"
  found NCCL_SOCKET_IFNAME "=$roce_interfaces"
fi

# look_around: the doctor's fast part, which says on stderr what could end a run, and ends none by itself.
look_around() {
  timeout 20 python -m scripts.doctor --fast >&2 || true
}

# stay_awake: the desktop must not suspend the machine while this process, which becomes the run, lasts. The inhibitor
# ends with it, by whatever way that is. NANOCHAT_STAY_AWAKE=0 leaves it out.
stay_awake() {
  if [[ "${NANOCHAT_STAY_AWAKE:-1}" != 0 && -d "${NANOCHAT_ROOT:-}/run/systemd/system" ]]; then
    setsid systemd-inhibit --what=sleep --who=nanochat --why="a model is in training" \
      tail --pid=$$ --follow /dev/null </dev/null >/dev/null 2>&1 &
  fi
}

# Else torch warns of each address that has no name, as those of a cable between two machines mostly have none.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# launch MODULE ARGS...: looks around, and becomes `python -m MODULE ARGS...`, in NPROC processes (torchrun) when NPROC
# is above 1, and on several machines with --hosts. It replaces the shell, so that Ctrl-C and the exit code are Python's.
launch() {
  trap "" HUP # a closed terminal does not stop a run; Python inherits it
  if ! [[ "${NPROC:-1}" =~ ^[1-9][0-9]{0,2}$ ]]; then
    echo "error: NPROC=$NPROC is not a number of processes: set it to the number of GPUs, such as NPROC=8" >&2
    exit 2
  fi
  look_around
  stay_awake
  if ((${NPROC:-1} == 1)) && [[ " $*" != *" --hosts"[\ =]* ]]; then exec python -m "$@"; fi
  exec python -m scripts.launch "${NPROC:-1}" "$@"
}
