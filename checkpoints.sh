#!/usr/bin/env bash
# Lists the checkpoints and checks their files; verify, prune, archive and restore do what they say.
# --demo means those of the demo; --help lists the commands.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.checkpoints "$@"
