#!/usr/bin/env bash
# Makes .venv and installs the pinned dependencies in it. Every other script calls it; when nothing changed it is done
# in a few hundredths of a second, without starting Python.
#
#   ./setup.sh             what the scripts need
#   ./setup.sh --dev       what the tests need as well
#   ./setup.sh --quiet     say nothing when there is nothing to do
#   ./setup.sh --dry-run   print each command with its reason, and run none
#   ./setup.sh --no-sudo   do what needs no root, and print the rest
#
# On a machine with an NVIDIA GPU it asks the system for what Triton needs as well, and ends with the doctor.
# PYTHON=/path/to/python chooses the Python; otherwise the first of python3, python3.13, 3.12, 3.11 that will do.
set -euo pipefail

root="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
venv="$root/.venv"

die() {
  echo "error: $*" >&2
  exit 2
}

# Python 3.11 to 3.13, whether or not it can make virtual environments; nothing where there is none.
any_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if [[ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" =~ ^3\.1[123]$ ]]; then
      echo "$candidate"
      return
    fi
  done
}

# A Python 3.11 to 3.13 that can make virtual environments with pip in them. python3 comes first: it is the one that the machine's owner
# chose. Each is run and not only looked up, since a version manager's shim can stand in PATH for a Python that is not there.
find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11) version without_venv=""
  if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
    [[ "$version" =~ ^3\.1[123]$ ]] || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 || has_pip_for_others "$candidate"; then
      echo "$candidate"
      return
    fi
    without_venv="$version"
  done
  if [[ -n "$without_venv" ]]; then
    die "Python $without_venv lacks the venv module: sudo apt install python$without_venv-venv"
  fi
  die "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ at PYTHON=$PYTHON}: sudo apt install python3 python3-venv," \
    "or set PYTHON to the path of one"
}

# has_pip_for_others PYTHON: it has a pip that can install into another environment (--python, since 22.3). Debian and
# Ubuntu leave ensurepip out until python3-venv is installed, which takes root; python3-pip may be there all the same.
has_pip_for_others() {
  "$1" -c 'import pip, venv; assert tuple(map(int, pip.__version__.split(".")[:2])) >= (22, 3)' >/dev/null 2>&1
}

# make_venv PYTHON: .venv anew, with a pip in it.
make_venv() {
  if "$1" -c 'import ensurepip' >/dev/null 2>&1; then
    "$1" -m venv --clear "$venv"
  else
    "$1" -m venv --clear --without-pip "$venv" && pip_from="$1" pip_install pip
  fi
}

has_gpu() {
  [[ "$(timeout 10 nvidia-smi -L 2>/dev/null)" == "GPU "* ]]
}

# What .venv was made from: these files and the Python behind it.
fingerprint() {
  cat "$root/setup.sh" "$root/pyproject.toml" "$root/constraints.txt" | sha256sum
  readlink -f "$venv/bin/python"
}

# up_to_date run|dev: .venv was completed from these files. A .venv made without a GPU is looked at again when one appears.
up_to_date() {
  [[ -x "$venv/bin/python" && -f "$venv/complete-$1" ]] || return 1
  [[ "$(<"$venv/complete-$1")" == "$(fingerprint)" ]] || return 1
  [[ -f "$venv/for-gpu" ]] || ! has_gpu
}

# step TEXT COMMAND...: a line with what is done and the seconds that it took; what the command has to say on failure.
step() {
  local text="$1" start=$SECONDS
  shift
  printf 'set-up: %s ... ' "$text"
  if ! "$@"; then
    printf '\nerror: set-up stopped at: %s. What was said above tells why; then run %s again\n' "$text" "$root/setup.sh" >&2
    exit 1
  fi
  printf '%d s\n' $((SECONDS - start))
}

# Twice quiet leaves out pip's warnings, not its errors. PIP_USER would send packages past the virtual environment.
# It is .venv's own pip, or, while there is none, that of the Python in $pip_from.
pip_install() {
  local pip=("$venv/bin/python" -m pip)
  if [[ -n "${pip_from:-}" ]]; then pip=("$pip_from" -m pip --python "$venv/bin/python"); fi
  PIP_USER=0 "${pip[@]}" install --quiet --quiet --no-input --disable-pip-version-check \
    --constraint "$root/constraints.txt" "$@"
}

# requirements [EXTRA]: the dependencies in pyproject.toml, one a line. The project itself is not installed: the scripts
# put its folder on PYTHONPATH, so that a copied or moved folder runs its own code and never another's.
requirements() {
  "$venv/bin/python" - "$root/pyproject.toml" "$@" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *(line for extra in sys.argv[2:] for line in project["optional-dependencies"][extra]), sep="\n")
PYTHON
}

# Which build of the pinned torch. "2.13.0+cpu" counts as a 2.13.0 and sorts above it, so where pip's own configuration
# (find-links, extra-index-url) offers that build pip takes it by itself: right without a GPU, wrong with one, hence the
# exclusion there. Where none is offered the registry's wheel is installed, which on x86_64 and aarch64 alike is
# the CUDA one. Its CUDA libraries cannot be left out to save their several GB: libtorch_global_deps.so and
# libtorch_python.so are linked against libcudart, libcudnn, libnccl and libcufile, so `import torch` fails without them.
install_packages() {
  local torch list packages
  torch="torch==$(sed -n 's/^torch==//p' "$root/constraints.txt")"
  list="$(requirements "$@")" || return
  mapfile -t packages <<<"$list"
  if has_gpu; then
    touch "$venv/for-gpu"
    torch="$torch,!=${torch#torch==}+cpu"
  elif ! [[ "$(pip_install --dry-run --no-deps --ignore-installed --report - "$torch")" == *'+cpu"'* ]]; then
    printf "\nset-up: pip's configuration offers no build of torch without CUDA for this Python, so this downloads several GB ... "
  fi
  pip_install "$torch" "${packages[@]}"
}

# The browser that the chat page's tests drive, where it can be had without a password; they are skipped without one.
install_browser() {
  local root_or_sudo=()
  if ((EUID)); then root_or_sudo=(sudo -n); fi
  {
    "${root_or_sudo[@]}" apt-get update -qq && "${root_or_sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium
  } >/dev/null 2>&1 || printf 'none to be had; the tests of the chat page are skipped ... '
}

# What making .venv comes to, for --dry-run.
print_venv_commands() {
  local python
  python="$(any_python)"
  printf 'set-up: in this folder, it would run\n'
  printf '  # %s\n  %s\n' \
    "a virtual environment, so that nothing else on the machine changes" \
    "${python:-python3} -m venv --clear $venv" \
    "the pinned torch, whose wheel is for CUDA 13, and what pyproject.toml asks for, at tested versions" \
    "$venv/bin/python -m pip install --constraint constraints.txt torch $(
      sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\).*/\1/p' "$root/pyproject.toml" | grep -vx torch | tr '\n' ' '
    )"
}

# In .venv's activate too, for those who work in it by hand. The folder is found anew, since the project may be moved.
activate_cuda() {
  # shellcheck disable=SC2016  # it is activate that expands it
  local line='if [ -f "$VIRTUAL_ENV/../scripts/cuda.sh" ]; then . "$VIRTUAL_ENV/../scripts/cuda.sh"; fi'
  grep -qxF "$line" "$venv/bin/activate" || echo "$line" >>"$venv/bin/activate"
}

extras=()
quiet=false
dry_run=false
with_sudo=true
for option in "$@"; do
  case "$option" in
    --dev) extras=(dev) ;;
    --quiet) quiet=true ;;
    --dry-run) dry_run=true ;;
    --no-sudo) with_sudo=false ;;
    -h | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$root/setup.sh"
      exit
      ;;
    *) die "unknown option $option: ./setup.sh takes --dev, --quiet, --dry-run, --no-sudo and --help" ;;
  esac
done
stamp="${extras[0]:-run}"

if $quiet && up_to_date "$stamp"; then exit; fi

gpu=false
if has_gpu; then
  gpu=true
  # shellcheck source=scripts/system.sh
  source "$root/scripts/system.sh"
fi
if up_to_date "$stamp" && ! $gpu; then
  echo "set-up: nothing to do"
  exit
fi

[[ -w "$root" ]] || die "cannot write to $root: clone the project into a folder you can write to"

# One set-up at a time: whoever comes second waits, and then finds the work done.
exec 9<"$root/setup.sh"
if ! flock --nonblock 9; then
  echo "set-up: waiting for another one to finish"
  flock 9
  if up_to_date "$stamp" && { $quiet || ! $gpu; }; then exit; fi
fi
if $gpu; then set_up_system "$(any_python)" "$dry_run" "$with_sudo"; fi

if up_to_date "$stamp"; then
  echo "set-up: nothing to do in .venv"
elif $dry_run; then
  print_venv_commands
  if ((${#extras[@]})) && $with_sudo && ! command -v chromium google-chrome >/dev/null; then
    printf '  # %s\n  %s\n' "the browser that the chat page's tests drive, as root and where no password is asked" \
      "apt-get update && apt-get install --no-install-recommends chromium"
  fi
else
  # Only a complete .venv is built upon. The marks go first, so that what an interruption leaves is made anew.
  if ! [[ -x "$venv/bin/python" && -f "$venv/complete-run" && "$(tail -n 1 "$venv/complete-run")" == "$(readlink -f "$venv/bin/python")" ]]; then
    python="$(find_python)"
    step "virtual environment with $("$python" --version 2>&1)" make_venv "$python"
    step "pip" pip_install pip
  fi
  rm -f "$venv"/complete-* "$venv/for-gpu"
  step "packages" install_packages ${extras[@]+"${extras[@]}"}
  if ((${#extras[@]})) && $with_sudo && ! command -v chromium google-chrome >/dev/null; then step "a browser" install_browser; fi
  if $gpu; then activate_cuda; fi
  for mark in run ${extras[@]+"${extras[@]}"}; do fingerprint >"$venv/complete-$mark"; done
fi
if $gpu && ! $quiet && ! $dry_run; then exec "$root/nanochat.sh" doctor 9<&-; fi
