#!/usr/bin/env bash
# Everything that is not a stage of training: ./nanochat.sh COMMAND [OPTIONS]
#
#   doctor        check the machine before a long run, with fixes
#   plan          estimate data, disk, memory, hours and energy of a training run
#   watch         follow a run in another terminal
#   report        rebuild the report: report.md, and report.html with its plots
#   checkpoints   list, verify, prune, archive and restore checkpoints
#   cluster       check two machines that train together, or copy files to them
#   benchmark     measure this machine, write the figures to benchmarks/results
#   import        import a model from the Hugging Face Hub or a folder
#
# ./nanochat.sh COMMAND --help lists the options of a command.
set -euo pipefail

command="${1:---help}"
case "$command" in
  doctor | plan | watch | report | checkpoints | cluster | benchmark) module="scripts.$command" ;;
  import) module=scripts.import_hf ;;
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
  *)
    echo "error: unknown command $command: ./nanochat.sh lists the commands" >&2
    exit 2
    ;;
esac
shift

# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
export NANOCHAT_COMMAND="./nanochat.sh $command"
exec python -m "$module" "$@"
