#!/usr/bin/env bash
# Talk to the model in the browser: a web server with the chat page, for the most advanced model there is.
# --demo takes the demo's model; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.chat_web "$@"
