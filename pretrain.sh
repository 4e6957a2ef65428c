#!/usr/bin/env bash
# Pretrain a base model, which continues text. Follows prepare.sh. Rerun it to resume.
# NPROC=8 for eight GPUs, --hosts a,b for two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.base_train "$@"
