"""One thin entry module per job."""

import signal
import sys

if sys.argv[0] == "-m":
    # `python -m scripts.NAME` imports torch next, which takes seconds: Ctrl-C ends it without a traceback until
    # nanochat.cli.run handles it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # SIGUSR1 saves a checkpoint during training; before and after, it would end the process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
