#!/usr/bin/env bash
# Run lint, the word list, types, shellcheck and all tests; with arguments, only pytest with these arguments:
# ./test.sh tests/test_shell.py -k path
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
./setup.sh --dev --quiet
# shellcheck source=scripts/env.sh
source scripts/env.sh

if (($#)); then exec python -m pytest "$@"; fi

python -m ruff check .
python -m ruff format --check .
python tests/check_words.py
python -m mypy
if command -v shellcheck >/dev/null; then
  shellcheck ./*.sh scripts/*.sh .ci/run
else
  echo "shellcheck: skipped, not found in .venv or PATH: sudo apt install shellcheck"
fi
# One process per core, up to four, each with one thread. A file's tests share a process, and the fixtures of the file.
OMP_NUM_THREADS=1 exec python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
