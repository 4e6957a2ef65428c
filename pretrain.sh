#!/usr/bin/env bash
# Pretraining: a base model that continues text. Needs what prepare.sh makes. Run again, it goes on where it stopped.
# NPROC=8 ./pretrain.sh trains on eight GPUs, --hosts a,b on two machines; --demo is the small run; --help lists the options.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
launch scripts.base_train "$@"
