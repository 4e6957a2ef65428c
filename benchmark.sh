#!/usr/bin/env bash
# Measures this machine and writes the figures to benchmarks/results, ready to be sent as a pull request.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.benchmark "$@"
