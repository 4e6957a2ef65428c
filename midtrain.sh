#!/usr/bin/env bash
# Midtraining: the base model learns the chat format, multiple choice, tool use, who it is and spelling.
# NPROC=8 for eight GPUs, --hosts a,b for two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.mid_train "$@"
