# shellcheck shell=bash
# Installs system packages on a machine with an NVIDIA GPU: a C compiler and Python headers, which Triton compiles with.
# No CUDA toolkit: torch and Triton bring their CUDA libraries, and a ptxas that supports the GB10. Never changes the
# driver. Sourced by setup.sh. NANOCHAT_ROOT replaces / with another folder, for the tests.

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

# find_system_needs PYTHON: fill root_reasons and root_commands with what is missing, in order. PYTHON may be empty.
find_system_needs() {
  local python="$1" packages=() version
  if ! command -v apt-get >/dev/null; then
    echo "setup: apt-get not found: install a C compiler and Python headers yourself"
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
  if ((${#packages[@]})); then
    needs "update the list of packages" "apt-get update"
    needs "install what Triton compiles with and .venv is created with" \
      "apt-get install --yes ${packages[*]}"
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
