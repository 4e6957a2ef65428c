"""torchrun, with the exit code of the process that failed first instead of a trace.

python -m scripts.processes 2 scripts.base_train --depth 4
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

EXIT_INTERRUPTED = 130
SECONDS_TO_STOP = 600
"""How long processes told to stop may take for the end of their step and the checkpoint before they are killed."""


def main(count: str, *command: str, machines: Sequence[str] = ("--standalone",)) -> None:
    """Run `python -m command` in `count` processes on this machine that know of each other, and exit as they do.

    `machines`: torchrun's options that say which other machines there are.
    """
    logging.disable(logging.ERROR)  # the processes speak for themselves
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal does not stop a run
    signal.signal(signal.SIGUSR1, lambda *_: pass_on(signal.SIGUSR1))
    # A variable and not --shutdown-timeout: a torch that does not know it goes on with its 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    arguments = parse_args([*machines, f"--nproc-per-node={count}", "-m", *command])
    arguments.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"  # by default SIGHUP as well
    try:
        run(arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode >= 0:
            sys.exit(first.exitcode)
        killed_by = signal.Signals(-first.exitcode)
        why = ", perhaps for want of memory" if killed_by == signal.SIGKILL else ""
        print(f"error: process {rank} was ended by {killed_by.name}{why}", file=sys.stderr)
        sys.exit(128 + killed_by)
    except (KeyboardInterrupt, SignalException):  # the second is what torchrun makes of a signal, once all have ended
        sys.exit(EXIT_INTERRUPTED)


def pass_on(number: signal.Signals) -> None:
    """Send a signal to the processes that were started from here."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), number)


if __name__ == "__main__":
    main(*sys.argv[1:])
