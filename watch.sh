#!/usr/bin/env bash
# Shows how a run stands, from another terminal; with --web as a page in the browser.
# --demo watches the demo; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.watch "$@"
