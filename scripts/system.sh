# shellcheck shell=bash
# What set-up asks of the system on a machine with an NVIDIA GPU: a C compiler and Python's headers, with which Triton
# starts its kernels, and on a GB10 CUDA 13.0's toolkit, whose ptxas knows that chip. Other GPUs need no toolkit: torch
# brings its CUDA libraries, and Triton a ptxas that knows them. The driver is never touched.
# Sourced by setup.sh. NANOCHAT_ROOT puts another folder in the place of /, for the tests.

toolkit_package=cuda-toolkit-13-0
cuda_packages=https://developer.download.nvidia.com/compute/cuda/repos
root_reasons=()
root_commands=()

# needs REASON COMMAND: one command for root, as a line of shell.
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

# Whether CUDA 13's ptxas is where the scripts look for it.
has_toolkit() (
  # shellcheck source=scripts/cuda.sh
  source "$(dirname "${BASH_SOURCE[0]}")/cuda.sh" 2>/dev/null # what it has to say it says to those who use it
  [[ -x "${TRITON_PTXAS_PATH:-}" ]]
)

# The part of NVIDIA's repository that is for this system, such as ubuntu2404/sbsa.
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

# find_system_needs PYTHON: fills root_reasons and root_commands with what is missing, in order. PYTHON may be empty.
find_system_needs() {
  local python="$1" packages=() repository version
  if ! command -v apt-get >/dev/null; then
    echo "set-up: no apt-get here: see to a C compiler, Python's headers and, for a GB10, CUDA 13.0's toolkit yourself"
    return
  fi
  if [[ -n "$(dpkg --audit 2>/dev/null)" ]]; then
    needs "an installation was interrupted, and apt wants it finished first" "dpkg --configure -a"
  fi
  # A Python that does not come from the system brings its headers itself.
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
      echo "set-up: this system is not one of those that NVIDIA packages CUDA 13.0 for: install its toolkit yourself"
    fi
  fi
  if ((${#packages[@]})); then
    needs "the list of packages must be current" "apt-get update"
    needs "Triton compiles with them when a run begins, and .venv is made with them" \
      "apt-get install --yes ${packages[*]}"
  fi
  if $toolkit; then
    if ! [[ -f "${NANOCHAT_ROOT:-}/usr/share/keyrings/cuda-archive-keyring.gpg" ]]; then
      needs "NVIDIA's key, by which apt checks the signature of all that follows, and the address of its packages" \
        "keyring=\"\$(mktemp -d)/cuda-keyring.deb\"; curl --fail --silent --show-error --location --proto =https --output \"\$keyring\" $cuda_packages/$repository/cuda-keyring_1.1-1_all.deb"
      needs "the same" "dpkg --install \"\$keyring\""
    fi
    needs "NVIDIA's list of packages" "apt-get update"
    needs "the driver must stay as it is: stop here if the toolkit would change it" \
      "if apt-get install --simulate $toolkit_package | grep -E '^(Inst|Remv) (nvidia-(driver|dkms|kernel|open)|linux-(image|modules))'; then exit 1; fi"
    needs "the ptxas that knows the GB10 (sm_121), and nvcc; a few GB" "apt-get install --yes $toolkit_package"
  fi
}

# print_root_commands: what find_system_needs found, a reason and a command at a time.
print_root_commands() {
  local i
  for i in "${!root_commands[@]}"; do printf '  # %s\n  %s\n' "${root_reasons[i]}" "${root_commands[i]}"; done
}

is_root() {
  ((EUID == 0))
}

# may_become_root: as root, with sudo that does not ask, or with someone there whom it can ask.
may_become_root() {
  is_root || { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo --non-interactive true 2>/dev/null; }; }
}

# set_up_system PYTHON DRY_RUN WITH_SUDO: says what was found and what is missing, and installs it. All commands run in one shell of
# root's, so that sudo asks once however long they take. Without root the commands are printed and set-up goes on.
set_up_system() {
  local python="$1" dry_run="$2" with_sudo="$3" script sudo=(sudo)
  find_system_needs "$python"
  echo "set-up: found $(os_release PRETTY_NAME) on $(uname -m), $(gpu_query name), driver $(gpu_query driver_version)"
  if ! ((${#root_commands[@]})); then return; fi
  if $dry_run; then
    echo "set-up: as root, it would run"
    print_root_commands
    return
  fi
  if ! $with_sudo || ! may_become_root; then
    echo "set-up: goes on without root. Run these in a shell of root (sudo -s), and then ./setup.sh again:"
    print_root_commands
    return
  fi
  echo "set-up: now, as root, it runs"
  print_root_commands
  script="$(printf '%s\n' "set -euo pipefail" "export DEBIAN_FRONTEND=noninteractive" "${root_commands[@]}")"
  if is_root; then sudo=(); fi
  if ! ${sudo[@]+"${sudo[@]}"} bash -c "$script"; then
    echo "set-up: that stopped for the reason above; the rest goes on without it, and ./setup.sh tries again" >&2
  fi
}
