#!/usr/bin/env bash
# Run the whole pipeline at small scale, even on a CPU: setup, tokenizer, base, mid, SFT, RL, evaluation, chat.
# ./demo.sh takes 3 to 25 minutes on two cores, ./demo.sh --quick 2; --fresh starts over instead of resuming.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"

stage_options=(--demo)
eval_options=(--demo)
tag=(--model-tag d4)
for option in "$@"; do
  case "$option" in
    --quick) stage_options+=(--quick) eval_options+=(--quick) tag=(--model-tag d2) ;;
    --fresh) stage_options+=(--fresh) ;;
    -h | --help)
      sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *)
      echo "error: unknown option $option: ./demo.sh takes --quick, --fresh and --help" >&2
      exit 2
      ;;
  esac
done

"$root/prepare.sh" "${stage_options[@]}"
for stage in pretrain midtrain sft rl; do "$root/$stage.sh" "${stage_options[@]}" "${tag[@]}"; done
python -m scripts.chat_eval "${eval_options[@]}" "${tag[@]}"
exec python -m scripts.demo_summary --demo "${tag[@]}"
