# shellcheck shell=bash
# Installs system packages on a machine with an NVIDIA GPU: a C compiler and Python headers, which Triton compiles with,
# and on a GB10 the CUDA 13.0 toolkit, whose ptxas supports that chip. Other GPUs need no toolkit: torch and Triton
# bring their CUDA libraries and ptxas. Never changes the driver. Sourced by setup.sh. NANOCHAT_ROOT replaces / with
# another folder, for the tests.

toolkit_package=cuda-toolkit-13-0
cuda_packages=https://developer.download.nvidia.com/compute/cuda/repos
root_reasons=()
root_commands=()

# needs REASON COMMAND: add a command to run as root.
needs() {
  root_reasons+=("$1")
  root_commands+=("$2")
}

gpu_query() {
  timeout 10 nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1
}

os_release() {
  sed -n "s/^$1=//p" "${NANOCHAT_ROOT:-}/etc/os-release" 2>/dev/null | tr -d '"'
}

# True if the scripts find CUDA 13's ptxas.
has_toolkit() (
  # shellcheck source=scripts/cuda.sh
  source "$(dirname "${BASH_SOURCE[0]}")/cuda.sh" 2>/dev/null # its note is printed when the scripts run
  [[ -x "${TRITON_PTXAS_PATH:-}" ]]
)

# The folder of NVIDIA's repository for this system, such as ubuntu2404/sbsa.
cuda_repository() {
  local system architecture
  system="$(os_release ID)$(os_release VERSION_ID | tr -d .)"
  case "$(uname -m)" in
    aarch64) architecture=sbsa ;;
    x86_64) architecture=x86_64 ;;
    *) return 1 ;;
  esac
  case "$system/$architecture" in
    ubuntu2404/* | ubuntu2204/* | debian12/x86_64) echo "$system/$architecture" ;;
    *) return 1 ;;
  esac
}

# find_system_needs PYTHON: fill root_reasons and root_commands with what is missing, in order. PYTHON may be empty.
find_system_needs() {
  local python="$1" packages=() repository version
  if ! command -v apt-get >/dev/null; then
    echo "setup: apt-get not found: install a C compiler, Python headers and, for a GB10, the CUDA 13.0 toolkit yourself"
    return
  fi
  if [[ -n "$(dpkg --audit 2>/dev/null)" ]]; then
    needs "finish an interrupted installation, which apt requires first" "dpkg --configure -a"
  fi
  # A Python that is not the system's brings its own headers.
  if [[ -n "$python" && "$(readlink -f "$(command -v "$python")")" == /usr/bin/* ]]; then
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || packages+=("python$version-venv")
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' >/dev/null 2>&1 ||
      packages+=("python$version-dev")
  fi
  if ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then packages+=(build-essential); fi
  local toolkit=false
  if [[ "$(gpu_query compute_cap)" == 12.1 ]] && ! has_toolkit; then
    if repository="$(cuda_repository)"; then
      toolkit=true
      command -v curl >/dev/null || packages+=(curl)
    else
      echo "setup: NVIDIA has no CUDA 13.0 packages for this system: install its toolkit yourself"
    fi
  fi
  if ((${#packages[@]})); then
    needs "update the list of packages" "apt-get update"
    needs "install what Triton compiles with and .venv is created with" \
      "apt-get install --yes ${packages[*]}"
  fi
  if $toolkit; then
    if ! [[ -f "${NANOCHAT_ROOT:-}/usr/share/keyrings/cuda-archive-keyring.gpg" ]]; then
      needs "download the key that apt verifies NVIDIA's packages with, and their address" \
        "keyring=\"\$(mktemp -d)/cuda-keyring.deb\"; curl --fail --silent --show-error --location --proto =https --output \"\$keyring\" $cuda_packages/$repository/cuda-keyring_1.1-1_all.deb"
      needs "install that key" "dpkg --install \"\$keyring\""
    fi
    needs "update the list of NVIDIA's packages" "apt-get update"
    needs "stop here if the toolkit would change the driver" \
      "if apt-get install --simulate $toolkit_package | grep -E '^(Inst|Remv) (nvidia-(driver|dkms|kernel|open)|linux-(image|modules))'; then exit 1; fi"
    needs "install the ptxas that supports the GB10 (sm_121), and nvcc; a few GB" "apt-get install --yes $toolkit_package"
  fi
}

# print_root_commands: print each command below its reason.
print_root_commands() {
  local i
  for i in "${!root_commands[@]}"; do printf '  # %s\n  %s\n' "${root_reasons[i]}" "${root_commands[i]}"; done
}

is_root() {
  ((EUID == 0))
}

# may_become_root: true for root, with passwordless sudo, or in a terminal where sudo can ask for a password.
may_become_root() {
  is_root || { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo --non-interactive true 2>/dev/null; }; }
}

# set_up_system PYTHON DRY_RUN WITH_SUDO: install what is missing. All commands run in one root shell, so that sudo asks
# once however long they take. Without root they are printed and setup continues.
set_up_system() {
  local python="$1" dry_run="$2" with_sudo="$3" script sudo=(sudo)
  find_system_needs "$python"
  echo "setup: found $(os_release PRETTY_NAME) on $(uname -m), $(gpu_query name), driver $(gpu_query driver_version)"
  if ! ((${#root_commands[@]})); then return; fi
  if $dry_run; then
    echo "setup: would run as root"
    print_root_commands
    return
  fi
  if ! $with_sudo || ! may_become_root; then
    echo "setup: continuing without root. Run these in a root shell (sudo -s), then ./setup.sh again:"
    print_root_commands
    return
  fi
  echo "setup: running as root"
  print_root_commands
  script="$(printf '%s\n' "set -euo pipefail" "export DEBIAN_FRONTEND=noninteractive" "${root_commands[@]}")"
  if is_root; then sudo=(); fi
  if ! ${sudo[@]+"${sudo[@]}"} bash -c "$script"; then
    echo "setup: failed, see above; continuing without it. ./setup.sh retries" >&2
  fi
}
