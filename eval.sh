#!/usr/bin/env bash
# Measures the model of any stage: bits per byte on held-out text, and the chat tasks.
# --demo measures the demo's models; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
look_around
stay_awake
exec python -m scripts.chat_eval "$@"
