#!/usr/bin/env bash
# Create .venv and install the pinned dependencies. Every other script calls it; if nothing has changed, it returns
# within a few hundredths of a second, without starting Python.
#
#   ./setup.sh             install the dependencies of the scripts
#   ./setup.sh --dev       and those of the tests
#   ./setup.sh --quiet     print nothing if nothing has changed
#   ./setup.sh --dry-run   print each command with its reason, and run none
#   ./setup.sh --no-sudo   print the commands that need root instead of running them
#
# On a machine with an NVIDIA GPU it also installs the system packages that Triton needs, and runs the doctor at the
# end. PYTHON=/path/to/python chooses the Python; otherwise the first suitable of python3, python3.13, 3.12, 3.11.
set -euo pipefail

root="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
venv="$root/.venv"
unset PYTHONHOME PYTHONPATH # pip would take packages there for installed

die() {
  echo "error: $*" >&2
  exit 2
}

# Print a Python 3.11 to 3.13, even if it cannot create virtual environments; nothing if there is none.
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

# Print a Python 3.11 to 3.13 that can create virtual environments with pip. python3, the owner's choice, comes first.
# Each one is run, because a version manager's shim in PATH may stand for a Python that is not installed.
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

# has_pip_for_others PYTHON: true if its pip can install into another environment (--python, since 22.3). Debian and
# Ubuntu have no ensurepip without python3-venv, which takes root to install; python3-pip may still be installed.
has_pip_for_others() {
  "$1" -c 'import pip, venv; assert tuple(map(int, pip.__version__.split(".")[:2])) >= (22, 3)' >/dev/null 2>&1
}

# make_venv PYTHON: create .venv from scratch, with pip.
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

# Identify what .venv is made from: these files and its Python.
fingerprint() {
  cat "$root/setup.sh" "$root/pyproject.toml" "$root/constraints.txt" | sha256sum
  readlink -f "$venv/bin/python"
}

# up_to_date run|dev: true if .venv is complete and made from these files, and not made before a GPU was added.
up_to_date() {
  [[ -x "$venv/bin/python" && -f "$venv/complete-$1" ]] || return 1
  [[ "$(<"$venv/complete-$1")" == "$(fingerprint)" ]] || return 1
  [[ -f "$venv/for-gpu" ]] || ! has_gpu
}

# step TEXT COMMAND...: run a command; print a line with its description and duration, and its output if it fails.
step() {
  local text="$1" start=$SECONDS
  shift
  printf 'setup: %s ... ' "$text"
  if ! "$@"; then
    printf '\nerror: setup stopped at: %s, for the reason above; fix it and run %s again\n' "$text" "$root/setup.sh" >&2
    exit 1
  fi
  printf '%d s\n' $((SECONDS - start))
}

# Two --quiet hide pip's warnings, not its errors. Runs .venv's own pip, or, before it has one, that of the Python in
# $pip_from. Of pip's settings in the environment, only those on how to download are kept: others install elsewhere
# (PIP_TARGET, PIP_PREFIX, PIP_ROOT) or add conditions (PIP_REQUIRE_HASHES, PIP_CONSTRAINT, which NGC containers set and
# --constraint does not replace). The three that are set instead also replace those in pip's configuration files.
pip_install() (
  pip=("$venv/bin/python" -m pip)
  if [[ -n "${pip_from:-}" ]]; then pip=("$pip_from" -m pip --python "$venv/bin/python"); fi
  for name in "${!PIP_@}"; do
    case "$name" in
      PIP_*INDEX* | PIP_FIND_LINKS | PIP_*CERT | PIP_PROXY | PIP_TRUSTED_HOST | PIP_KEYRING_PROVIDER | PIP_CONFIG_FILE) ;;
      PIP_*CACHE_DIR | PIP_*TIMEOUT | PIP_RETRIES) ;;
      *) unset "$name" ;;
    esac
  done
  PIP_USER=0 PIP_REQUIRE_HASHES=0 PIP_CONSTRAINT=/dev/null "${pip[@]}" install --quiet --quiet --no-input \
    --disable-pip-version-check --constraint "$root/constraints.txt" "$@"
)

# The commands in .venv/bin name the folder that .venv was made in: in a copied project, .venv/bin/pip would install
# into the original. Change them to this folder.
adopt_venv() {
  local made_in here
  made_in="$(sed -n 's/^command = .* -m venv \(--[a-z-]* \)*//p' "$venv/pyvenv.cfg" 2>/dev/null)" || return 0
  here="$(readlink -f "$venv")"
  if [[ -z "$made_in" || "$made_in" == "$here" || ! -x "$venv/bin/python" || ! -w "$here/bin" ]]; then return; fi
  echo "setup: .venv was made in $(dirname "$made_in"): changing its commands to this folder"
  "$venv/bin/python" -I - "$made_in" "$here" <<'PYTHON'
import os, pathlib, sys

made_in, here = sys.argv[1:]
for path in [*pathlib.Path(here, "bin").iterdir(), pathlib.Path(here, "pyvenv.cfg")]:
    if path.is_symlink() or not path.is_file() or made_in.encode() not in (content := path.read_bytes()):
        continue
    first, rest = content.split(b"\n", 1)
    if first.startswith(b"#!" + made_in.encode()):  # a shell starts Python: a #! line cannot hold a space
        content = b"#!/bin/sh\n'''exec' \"%s\" \"$0\" \"$@\"\n' '''\n%s" % (first[2:], rest)
    changed = path.with_name(path.name + ".new")  # not in place: the original may share the file
    changed.write_bytes(content.replace(made_in.encode(), here.encode()))
    changed.chmod(path.stat().st_mode)
    os.replace(changed, path)
PYTHON
}

# requirements [EXTRA]: print the dependencies in pyproject.toml, one per line. The project itself is not installed: the
# scripts put its folder on PYTHONPATH, so that a copied or moved folder runs its own code.
requirements() {
  "$venv/bin/python" - "$root/pyproject.toml" "$@" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *(line for extra in sys.argv[2:] for line in project["optional-dependencies"][extra]), sep="\n")
PYTHON
}

# Choose the build of the pinned torch. "2.13.0+cpu" satisfies 2.13.0 and sorts above it, so pip takes it if its own
# configuration (find-links, extra-index-url) offers it: right without a GPU, wrong with one, hence the exclusion.
# Otherwise the registry's wheel is installed, a CUDA build on x86_64 and aarch64. Its CUDA libraries are several GB but
# needed even on a CPU: libtorch_global_deps.so and libtorch_python.so are linked against libcudart, libcudnn, libnccl
# and libcufile, and `import torch` fails without them.
install_packages() {
  local torch list packages
  torch="torch==$(sed -n 's/^torch==//p' "$root/constraints.txt")"
  list="$(requirements "$@")" || return
  mapfile -t packages <<<"$list"
  if has_gpu; then
    touch "$venv/for-gpu"
    torch="$torch,!=${torch#torch==}+cpu"
  elif ! [[ "$(pip_install --dry-run --no-deps --ignore-installed --report - "$torch")" == *'+cpu"'* ]]; then
    printf "\nsetup: pip's configuration has no CPU build of torch for this Python, downloading several GB ... "
  fi
  pip_install "$torch" "${packages[@]}"
}

# Install the browser for the chat page's tests, if that takes no password; they are skipped without it.
install_browser() {
  local root_or_sudo=()
  if ((EUID)); then root_or_sudo=(sudo -n); fi
  {
    "${root_or_sudo[@]}" apt-get update -qq && "${root_or_sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium
  } >/dev/null 2>&1 || printf 'not available; the tests of the chat page are skipped ... '
}

# Print the commands that create .venv, for --dry-run.
print_venv_commands() {
  local python
  python="$(any_python)"
  printf 'setup: would run in this folder\n'
  printf '  # %s\n  %s\n' \
    "create a virtual environment, so that nothing else on the machine changes" \
    "${python:-python3} -m venv --clear $venv" \
    "install the pinned torch, a CUDA 13 build, and the dependencies in pyproject.toml at tested versions" \
    "$venv/bin/python -m pip install --constraint constraints.txt torch $(
      sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\).*/\1/p' "$root/pyproject.toml" | grep -vx torch | tr '\n' ' '
    )"
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

$dry_run || adopt_venv
if $quiet && up_to_date "$stamp"; then exit; fi

gpu=false
if has_gpu; then
  gpu=true
  # shellcheck source=scripts/system.sh
  source "$root/scripts/system.sh"
fi
if up_to_date "$stamp" && ! $gpu; then
  echo "setup: nothing to do"
  exit
fi

[[ -w "$root" ]] || die "cannot write to $root: clone the project into a folder you can write to"

# One setup at a time: a second one waits and then finds the work done.
exec 9<"$root/setup.sh"
if ! flock --nonblock 9; then
  echo "setup: waiting for another setup to finish"
  flock 9
  if up_to_date "$stamp" && { $quiet || ! $gpu; }; then exit; fi
fi
if $gpu; then set_up_system "$(any_python)" "$dry_run" "$with_sudo"; fi

if up_to_date "$stamp"; then
  echo "setup: nothing to do in .venv"
elif $dry_run; then
  print_venv_commands
  if ((${#extras[@]})) && $with_sudo && ! command -v chromium google-chrome >/dev/null; then
    printf '  # %s\n  %s\n' "install the browser for the chat page's tests, as root, if that takes no password" \
      "apt-get update && apt-get install --no-install-recommends chromium"
  fi
else
  # Update only a complete .venv. The marks are removed first, so that an interrupted one is created from scratch.
  if ! [[ -x "$venv/bin/python" && -f "$venv/complete-run" && "$(tail -n 1 "$venv/complete-run")" == "$(readlink -f "$venv/bin/python")" ]]; then
    python="$(find_python)"
    step "virtual environment with $("$python" --version 2>&1)" make_venv "$python"
    step "pip" pip_install pip
  fi
  rm -f "$venv"/complete-* "$venv/for-gpu"
  step "packages" install_packages ${extras[@]+"${extras[@]}"}
  if ((${#extras[@]})) && $with_sudo && ! command -v chromium google-chrome >/dev/null; then step "a browser" install_browser; fi
  for mark in run ${extras[@]+"${extras[@]}"}; do fingerprint >"$venv/complete-$mark"; done
fi
if $gpu && ! $quiet && ! $dry_run; then exec "$root/nanochat.sh" doctor 9<&-; fi
