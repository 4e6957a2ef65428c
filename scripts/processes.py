"""torchrun, with the exit code of the process that failed first instead of a trace.

python -m scripts.processes 2 scripts.base_train --depth 4
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(count: str, *command: str) -> None:
    """Run `python -m command` in `count` processes on this machine that know of each other."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={count}", "-m", *command]))
    except ChildFailedError as failure:
        sys.exit(failure.get_first_failure()[1].exitcode)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
