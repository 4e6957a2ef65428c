#!/usr/bin/env bash
# Gets ready what training reads: tokenizer, text, token files and the identity conversations.
# --demo does it for the small run on the text that comes with the installation; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
look_around
stay_awake
exec python -m scripts.prepare "$@"
