#!/usr/bin/env bash
# Midtrain the base model: chat format, multiple choice, tool use, identity and spelling. Follows pretrain.sh.
# NPROC=8 for eight GPUs, --hosts a,b for two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.mid_train "$@"
