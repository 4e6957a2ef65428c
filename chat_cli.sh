#!/usr/bin/env bash
# Chat in the terminal with the model of the latest stage; -p "text" prints one answer.
# --demo uses the demo's model; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.chat_cli "$@"
