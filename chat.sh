#!/usr/bin/env bash
# Chat in the browser with the model of the latest stage, and serve it through an OpenAI-compatible API.
# --demo uses the demo's model; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.chat_web "$@"
