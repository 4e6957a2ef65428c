#!/usr/bin/env bash
# Two machines that train together: ./cluster.sh check localhost spark-b looks at what lies between them,
# ./cluster.sh sync spark-b copies there what it lacks.
# shellcheck source=scripts/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/env.sh"
exec python -m scripts.cluster "$@"
