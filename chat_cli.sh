#!/usr/bin/env bash
# Talk to the most advanced model there is in the terminal; -p "text" prints one answer.
# --demo takes the demo's model; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.chat_cli "$@"
