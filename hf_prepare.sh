#!/usr/bin/env bash
# Makes folders that transformers loads as they are from the trained models, and proves that they are the same models.
# ./hf_prepare.sh --author NAME; --demo takes the demo's models; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.hf_prepare "$@"
