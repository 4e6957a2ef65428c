#!/usr/bin/env bash
# Brings in a model trained elsewhere, from the Hugging Face Hub or a folder, as a checkpoint of this project.
# ./import_hf.sh REPOSITORY_OR_FOLDER; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.import_hf "$@"
