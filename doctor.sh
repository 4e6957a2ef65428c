#!/usr/bin/env bash
# Is this machine fit for a run of days? A line for each thing, with the command that mends it.
# --depth 20 names the model planned; --json is for programs; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.doctor "$@"
