# shellcheck shell=sh
# Sets the paths of CUDA 13 for just-in-time compilation. Sourced by scripts/env.sh and by .venv's activate, in bash,
# zsh or sh. Variables that are already set stay, except a CUDA_HOME older than CUDA 13 if CUDA 13 is installed: an
# older nvcc cannot build for torch's CUDA 13 and does not support a GB10.

for toolkit in "${CUDA_HOME:-}" "${NANOCHAT_ROOT:-}/usr/local/cuda-13.0" "${NANOCHAT_ROOT:-}/usr/local/cuda"; do
  if [ -n "$toolkit" ] && "$toolkit/bin/nvcc" --version 2>/dev/null | grep -q 'release 1[3-9]'; then
    if [ -n "${CUDA_HOME:-}" ] && [ "$CUDA_HOME" != "$toolkit" ]; then
      echo "note: CUDA_HOME=$CUDA_HOME is not CUDA 13, using $toolkit instead" >&2
    fi
    # torch's extension builder reads it.
    export CUDA_HOME="$toolkit"
    case ":$PATH:" in *":$toolkit/bin:"*) ;; *) export PATH="$PATH:$toolkit/bin" ;; esac
    # Last: the libraries in torch's packages, which it was tested with, come first.
    case ":${LD_LIBRARY_PATH:-}:" in
      *":$toolkit/lib64:"*) ;;
      *) export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$toolkit/lib64" ;;
    esac
    # Triton's own ptxas may not support the GB10 (sm_121); CUDA 13's does.
    if [ -z "${TRITON_PTXAS_PATH:-}" ] && [ -x "$toolkit/bin/ptxas" ]; then
      export TRITON_PTXAS_PATH="$toolkit/bin/ptxas"
    fi
    break
  fi
done
unset toolkit
