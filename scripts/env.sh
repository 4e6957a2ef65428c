# shellcheck shell=bash
# What every script starts with: `source` it, then `launch MODULE "$@"` or `exec python -m MODULE "$@"`.
# It makes .venv when that is missing or out of date, puts it and this project first, and says where things are kept.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"

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
# blocks of different sizes, and fixed segments fragment until a step that fits no longer does. No effect on a CPU.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# The ptxas inside triton may not know the GB10 (sm_121); CUDA 13's does. An older toolkit's would be a step back.
if [[ -z "${TRITON_PTXAS_PATH:-}" && "$(/usr/local/cuda/bin/ptxas --version 2>/dev/null)" =~ release\ 1[3-9] ]]; then
  export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas
fi

# Else torch warns of each address that has no name, as those of a cable between two machines mostly have none.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# launch MODULE ARGS...: becomes `python -m MODULE ARGS...`, in NPROC processes (torchrun) when NPROC is above 1, and on
# several machines with --hosts. It replaces the shell, so that Ctrl-C and the exit code are Python's.
launch() {
  trap "" HUP  # a closed terminal does not stop a run; Python inherits it
  case "${NPROC:-1}" in
    [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) ;;
    *)
      echo "error: NPROC=$NPROC is not a number of processes: set it to the number of GPUs, such as NPROC=8" >&2
      exit 2
      ;;
  esac
  if [[ " $*" == *" --hosts"[\ =]* ]]; then exec python -m scripts.hosts "$(basename "$0")" "$@"; fi
  if [[ "${NPROC:-1}" == 1 ]]; then exec python -m "$@"; fi
  exec python -m scripts.processes "$NPROC" "$@"
}
