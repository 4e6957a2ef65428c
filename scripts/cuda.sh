# shellcheck shell=sh
# Where CUDA 13 is, for what is compiled while a run goes. Sourced by scripts/env.sh and by .venv's activate, in bash,
# zsh or sh. What is set already stays as it is, but for a CUDA_HOME that is not CUDA 13 (or later) where that is here:
# an older nvcc builds nothing for a torch that is made for CUDA 13, and knows no GB10.

for toolkit in "${CUDA_HOME:-}" "${NANOCHAT_ROOT:-}/usr/local/cuda-13.0" "${NANOCHAT_ROOT:-}/usr/local/cuda"; do
  if [ -n "$toolkit" ] && "$toolkit/bin/nvcc" --version 2>/dev/null | grep -q 'release 1[3-9]'; then
    if [ -n "${CUDA_HOME:-}" ] && [ "$CUDA_HOME" != "$toolkit" ]; then
      echo "note: CUDA_HOME=$CUDA_HOME is not CUDA 13: $toolkit, which is, is used instead" >&2
    fi
    # Extensions that are built for torch look here.
    export CUDA_HOME="$toolkit"
    case ":$PATH:" in *":$toolkit/bin:"*) ;; *) export PATH="$PATH:$toolkit/bin" ;; esac
    # Last, so that the libraries of torch's own packages, which it was tested with, come first.
    case ":${LD_LIBRARY_PATH:-}:" in
      *":$toolkit/lib64:"*) ;;
      *) export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$toolkit/lib64" ;;
    esac
    # The ptxas inside Triton may not know the GB10 (sm_121); CUDA 13's does. A file that is not there would be worse.
    if [ -z "${TRITON_PTXAS_PATH:-}" ] && [ -x "$toolkit/bin/ptxas" ]; then
      export TRITON_PTXAS_PATH="$toolkit/bin/ptxas"
    fi
    break
  fi
done
unset toolkit
