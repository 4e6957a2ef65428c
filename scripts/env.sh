# shellcheck shell=bash
# Sourced at the start of every script, which then runs `launch MODULE "$@"` or `exec python -m MODULE "$@"`.
# Creates or updates .venv, puts it and this project first in the search paths, and sets variables for this machine.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"

if [[ -z "${HOME:-}" ]]; then # as in some services
  unset HOME
  export HOME=~
fi
unset PYTHONHOME

export NANOCHAT_COMMAND="./${0##*/}" # program name in --help
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
if ! mkdir -p "$NANOCHAT_BASE_DIR" 2>/dev/null; then
  echo "error: cannot create $NANOCHAT_BASE_DIR: set NANOCHAT_BASE_DIR to a folder you can write to" >&2
  exit 2
fi

"$root/setup.sh" --quiet

# Not .venv/bin/activate, which contains the path where .venv was created and breaks when the project is moved.
export VIRTUAL_ENV="$root/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"

# Scripts run from any folder: packages are found in the project, and never in the current folder, where a folder called
# `scripts` would hide ours.
export PYTHONPATH="$root"
export PYTHONSAFEPATH=1

# NVIDIA's PyTorch images name their own torch here, and pip's CPU build would load those libraries instead of .venv's.
if [[ "${LD_LIBRARY_PATH:-}" == */torch/lib* ]]; then
  LD_LIBRARY_PATH="$(tr ':' '\n' <<<"$LD_LIBRARY_PATH" | sed '/\/torch\/lib\/*$/d' | paste -s -d ':')"
  export LD_LIBRARY_PATH
fi

# Keep compiled kernels across reboots, unlike /tmp, the default: compiling takes minutes on a GPU.
# Neither in a read-only folder, nor below a folder with a space in its name, which torch does not quote for the linker.
if [[ -w "$NANOCHAT_BASE_DIR" && "$NANOCHAT_BASE_DIR" != *[[:space:]]* ]]; then
  export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$NANOCHAT_BASE_DIR/cache/inductor}"
  export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$NANOCHAT_BASE_DIR/cache/triton}"
fi

# Let CUDA's allocator grow its segments: training, sampling and evaluation allocate blocks of different sizes in turn,
# and fixed segments fragment until a step no longer fits. On unified memory, fragments are lost to the CPU as well.
# PYTORCH_CUDA_ALLOC_CONF, the older name of the variable, takes precedence.
if [[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then
  export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

# found NAME VALUE: set a variable for this machine, unless it is already set. NANOCHAT_FOUND lists them, so that they
# are not sent to the other machines of a run.
found() {
  if [[ -z "${!1:-}" ]]; then
    export "$1=$2" NANOCHAT_FOUND="${NANOCHAT_FOUND:+$NANOCHAT_FOUND,}$1"
  fi
}

# The GB10 has 10 fast and 10 slow cores, and a parallel loop ends with its slowest thread: use one thread per fast
# core. Linux has cpu_capacity only for mixed cores; the slow ones have about 0.7 of the fast.
fast_cores="$(cat "${NANOCHAT_ROOT:-}"/sys/devices/system/cpu/cpu[0-9]*/cpu_capacity 2>/dev/null |
  awk '{ capacity[NR] = $1; if ($1 > max) max = $1 }
       END { for (i in capacity) fast += capacity[i] >= 0.85 * max; if (fast < NR) print fast }')" || true
if [[ -n "$fast_cores" ]]; then found OMP_NUM_THREADS "$fast_cores"; fi

# OpenMP threads sleep sooner while they wait: training is as fast as with the default of 300,000 spins on an idle
# machine and 1.15 times faster next to one busy process (docs/experiments.md).
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

# On a CPU, glibc allocates blocks of up to 32 MB from its heap and keeps up to 1 GB of it free, instead of returning
# memory to the kernel, which would fill every page with zeros again: a training step had 90,000 page faults and took 9%
# longer (docs/experiments.md). A GPU's activations are not in that memory.
if ! compgen -G "${NANOCHAT_ROOT:-}/dev/nvidia[0-9]*" >/dev/null; then
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # glibc's maximum
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
fi

# Two Sparks are connected over RoCE: name the active ConnectX-7 ports that have an address, both halves of each (a GB10
# reaches one port over two PCIe links of 100 Gb/s), or NCCL may choose the slow network. Nothing is set without such a
# port.
roce_devices="" roce_interfaces=""
for port in "${NANOCHAT_ROOT:-}"/sys/class/infiniband/*/ports/1; do
  interface="$(cat "$port/gid_attrs/ndevs/0" 2>/dev/null)" || continue
  [[ "$(<"$port/link_layer")" == Ethernet && "$(<"$port/state")" == *ACTIVE ]] || continue
  [[ -n "$(ip -oneline -4 address show dev "$interface" 2>/dev/null)" ]] || continue
  device="${port%/ports/1}"
  roce_devices+="${roce_devices:+,}${device##*/}"
  roce_interfaces+="${roce_interfaces:+,}$interface"
done
if [[ -n "$roce_devices" ]]; then # "=": exactly these names, not prefixes
  found NCCL_IB_HCA "=$roce_devices"
  found NCCL_SOCKET_IFNAME "=$roce_interfaces"
fi

# look_around: print the problems that the doctor's quick checks find to stderr; never stops a run.
look_around() {
  timeout 20 python -m scripts.doctor --fast >&2 || true
}

# stay_awake: keep the desktop from suspending the machine until this process, which becomes the run, ends in any way.
# NANOCHAT_STAY_AWAKE=0 disables it.
stay_awake() {
  if [[ "${NANOCHAT_STAY_AWAKE:-1}" != 0 && -d "${NANOCHAT_ROOT:-}/run/systemd/system" ]]; then
    setsid systemd-inhibit --what=sleep --who=nanochat --why="training a model" \
      tail --pid=$$ --follow /dev/null </dev/null >/dev/null 2>&1 &
  fi
}

# Otherwise torch warns about every address without a host name, such as those of a direct cable.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# launch MODULE ARGS...: run the quick checks, then replace this shell with `python -m MODULE ARGS...`, in NPROC
# processes (torchrun) if NPROC is above 1, and on several machines with --hosts. Ctrl-C and the exit code are Python's.
launch() {
  trap "" HUP # a closed terminal does not stop a run; inherited by Python
  if ! [[ "${NPROC:-1}" =~ ^[1-9][0-9]{0,2}$ ]]; then
    echo "error: NPROC must be a number of processes between 1 and 999, such as the number of GPUs, got \"$NPROC\"" >&2
    exit 2
  fi
  if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then exec python -m "$@"; fi
  if ((${NPROC:-1} > $(nproc --all))); then
    echo "error: NPROC must be at most $(nproc --all), the number of CPU cores, got $NPROC" >&2
    exit 2
  fi
  look_around
  stay_awake
  if ((${NPROC:-1} == 1)) && [[ " $*" != *" --hosts"[\ =]* ]]; then exec python -m "$@"; fi
  exec python -m scripts.launch "${NPROC:-1}" "$@"
}
