#!/usr/bin/env bash
# Check and time everything that needs a GPU, in at most 8 minutes on one H100 or GB10, without a network.
#
#   benchmarks/gpu_check.sh [--folder FOLDER]    writes gpu_check.json and gpu_check.md; default: benchmarks/results
#
# PYTHON=/path/to/python chooses the Python, one with torch 2.11 or 2.13; otherwise .venv's. Of the project's packages it
# needs numpy, pytest, pytest-timeout, pyarrow, safetensors, tiktoken, rustbpe, tokenizers, transformers, httpx2, tyro,
# rich and huggingface_hub 2; PYTHONPATH may name folders with those that it lacks.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
python="${PYTHON:-$root/.venv/bin/python}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
cd "$root"
exec "$python" -m benchmarks.gpu_check "$@"
