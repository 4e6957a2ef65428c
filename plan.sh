#!/usr/bin/env bash
# What a model takes, before it is begun: data, disk, memory, hours, kWh. ./plan.sh --depth 20 --hosts 2
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.plan "$@"
