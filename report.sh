#!/usr/bin/env bash
# Writes the report on what was trained anew: report.md, and report.html with its plots. Every stage does so by itself.
# --demo reports on the demo's models; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.report "$@"
