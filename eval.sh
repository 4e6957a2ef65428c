#!/usr/bin/env bash
# Evaluate the model of every stage: bits per byte of held-out text, and tasks.
# --demo evaluates the demo's models; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
look_around
stay_awake
exec python -m scripts.chat_eval "$@"
