#!/usr/bin/env bash
# Export the trained models to folders that transformers loads, and verify that they are the same models.
# ./hf_prepare.sh --author NAME; --demo exports the demo's models; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.hf_prepare "$@"
