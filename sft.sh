#!/usr/bin/env bash
# Supervised fine-tuning on conversations, with a loss on the assistant's tokens only. Follows midtrain.sh.
# NPROC=8 for eight GPUs, --hosts a,b for two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.chat_sft "$@"
