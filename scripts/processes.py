"""torchrun, with the exit code of the process that failed first instead of a trace.

python -m scripts.processes 2 scripts.base_train --depth 4
"""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

EXIT_INTERRUPTED = 130
SECONDS_TO_STOP = 600
"""How long processes told to stop may take for the end of their step and the checkpoint before they are killed."""


def main(count: str, *command: str) -> None:
    """Run `python -m command` in `count` processes on this machine that know of each other."""
    logging.disable(logging.ERROR)  # the processes speak for themselves
    # A variable and not --shutdown-timeout: a torch that does not know it goes on with its 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={count}", "-m", *command]))
    except ChildFailedError as failure:
        sys.exit(failure.get_first_failure()[1].exitcode)
    except (KeyboardInterrupt, SignalException):  # the second is what torchrun makes of a signal, once all have ended
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
