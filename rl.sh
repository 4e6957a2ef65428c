#!/usr/bin/env bash
# Train by reinforcement learning on problems with checkable answers. Follows sft.sh.
# NPROC=8 for eight GPUs, --hosts a,b for two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.chat_rl "$@"
