"""One thin entry module a job."""

import signal
import sys

if sys.argv[0] == "-m":
    # `python -m scripts.NAME` goes on to import torch, which takes seconds: Ctrl-C ends it without a traceback until
    # nanochat.cli.run takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # And before and after its steps a run has nothing to save: SIGUSR1 would end it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
