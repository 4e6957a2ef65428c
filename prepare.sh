#!/usr/bin/env bash
# Prepare the training data: text, tokenizer, token files and identity conversations.
# --demo uses text included in the installation; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
look_around
stay_awake
exec python -m scripts.prepare "$@"
